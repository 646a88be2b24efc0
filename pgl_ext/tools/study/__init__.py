"""Studies: methods x labelled cases x seeds, each pre-trained, fine-tuned and evaluated, and compared in the end."""
