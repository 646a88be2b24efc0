"""What works on whole runs: the commands, studies, reports, packages, phantoms. Never part of a packaged bundle."""
