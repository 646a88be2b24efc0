"""Short real runs on phantoms; each chain is a process of its own: python smoke.py NAME."""

from __future__ import annotations

import subprocess
import sys

from settings import PRETRAIN, PY, SEGMENT, TINY, WORK, configs

BUNDLE = ["-m", "monai.bundle", "run"]


def run(*arguments: object) -> None:
    print(">", *arguments, flush=True)
    status = subprocess.run([PY, *map(str, arguments)]).returncode
    if status:
        sys.exit(f"FAILED: status {status}")


def pretrain(name: str, *extra: object, overlays: tuple[str, ...] = (), launcher: tuple[str, ...] = ()) -> None:
    """Two epochs of pre-training on phantoms."""
    files = ["train.json", *([] if name == "pretrain" and not TINY else ["small.yaml"]), *overlays]
    listed = "[" + ",".join(f"'{PRETRAIN}/{file}'" for file in files) + "]"
    settings = ["--max_epochs", 2, "--patches_per_volume", 8, "--spacing", "[5,5,5]", "--overwrite", "true"]
    places = ["--data_list_file_path", WORK / "phantom" / "dataset.json", "--output_dir", WORK / "smoke" / name]
    run(*launcher, *BUNDLE, "training", "--config_file", listed, *places, *settings, *extra)


def finetune(name: str) -> None:
    """Two epochs of fine-tuning on phantoms, and the evaluation."""
    data, out = WORK / "phantom" / "dataset.json", WORK / "smoke" / name
    settings = ["--spacing", "[5,5,5]", "--labelled_cases", 3, "--max_epochs", 2, "--patches_per_case", 4]
    places = ["--data_list_file_path", data, "--output_dir", out, "--overwrite", "true"]
    files = configs(SEGMENT, "tasks/phantom.yaml")
    run(*BUNDLE, "training", "--config_file", files, *places, *settings, "--patch_size", "[64,64,32]")
    tested = ["--data_list_file_path", data, "--data_list_key", "test", "--output_dir", out / "evaluation"]
    model = ["--model_path", out / "models" / "model.pt"]
    run(*BUNDLE, "evaluating", "--config_file", f"{SEGMENT}/evaluate.json", *model, *tested)


def main(name: str) -> None:
    if name == "pretrain":
        pretrain(name, "--num_workers", 2)
        pretrain(name, "--num_workers", 2, "--resume", "true")
    elif name == "finetune":
        finetune(name)
    elif name == "float16":
        pretrain(name, "--amp", "true", "--amp_dtype", "float16")
    elif name == "compile":
        pretrain(name, "--compile", "true")
    elif name == "ddp":
        launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1")
        pretrain(name, overlays=("multi_gpu_train.json",), launcher=launcher)
    else:
        pretrain(name, overlays=(f"methods/{name}.yaml",))


if __name__ == "__main__":
    main(sys.argv[1])
