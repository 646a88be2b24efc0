"""OpenKBP's files as NIfTI, with the data lists of the openkbp studies.

Clone https://github.com/ababier/open-kbp, then:

    python studies/prepare_openkbp.py open-kbp/provided-data OUT

Writes OUT/openkbp_ssl (scans) and OUT/openkbp_seg (scans and label maps, lists "training" and "validation"), of the
patients in openkbp_patients.yaml. The scans come from collections of The Cancer Imaging Archive, whose terms hold.

The files list the voxels of a box of 128 x 128 x 128 that have a value. Two things are not documented there and were
inferred from the scans: that stored values are HU + 1000, within some 24 HU, and that the axes run to back, left and
feet. Voxels without a value lie outside the patient, or the slab that was kept, and become air.
"""

from __future__ import annotations

import json
from pathlib import Path

import fire
import nibabel as nib
import numpy as np
import yaml
from tqdm import tqdm

PATIENTS = Path(__file__).with_name("openkbp_patients.yaml")
ORGANS = ("Brainstem", "SpinalCord", "RightParotid", "LeftParotid", "Esophagus", "Larynx", "Mandible")  # labels 1 to 7
BOX = (128, 128, 128)
AXES = ("P", "L", "I")
MARGINS = (3, 3, 0)  # voxels around those that have a value; scans end at head and feet
AIR, HIGHEST = -1000, 3071  # HU


def read_patient(folder: Path) -> tuple[nib.Nifti1Image, nib.Nifti1Image, list[str]]:
    """Scan (HU) and label map of a patient, both RAS and int16 or uint8, and the organs that were contoured."""
    voxels = np.loadtxt(folder / "ct.csv", delimiter=",", skiprows=1, ndmin=2)
    indices = voxels[:, 0].astype(int)
    scan = np.full(BOX, AIR, np.int16)
    scan.flat[indices] = np.clip(voxels[:, 1] + AIR, None, HIGHEST)
    labels = np.zeros(BOX, np.uint8)
    contoured = [organ for organ in ORGANS if (folder / f"{organ}.csv").is_file()]
    for organ in contoured:  # a voxel of two organs is the later one's
        listed = np.loadtxt(folder / f"{organ}.csv", delimiter=",", skiprows=1, usecols=0, dtype=int, ndmin=1)
        labels.flat[listed] = ORGANS.index(organ) + 1
    box = _box(indices)
    spacing = np.loadtxt(folder / "voxel_dimensions.csv")
    return _image(scan[box], spacing), _image(labels[box], spacing), contoured


def _box(indices: np.ndarray) -> tuple[slice, ...]:
    """The voxels' bounding box with a margin, as far as there is one."""
    axes = zip(np.unravel_index(indices, BOX), MARGINS, strict=True)
    return tuple(slice(max(0, places.min() - margin), places.max() + 1 + margin) for places, margin in axes)


def _image(array: np.ndarray, spacing: np.ndarray) -> nib.Nifti1Image:
    """An array with axes ``AXES`` as RAS. Its centre becomes the origin: where the patient lay is not told."""
    affine = np.zeros((4, 4))
    for axis, (world, direction) in enumerate(nib.orientations.axcodes2ornt(AXES).astype(int)):
        affine[world, axis] = direction * spacing[axis]
    affine[:3, 3] = -affine[:3, :3] @ (np.array(array.shape) - 1) / 2
    affine[3, 3] = 1
    return nib.as_closest_canonical(nib.Nifti1Image(array, affine))


def prepare(source: str, out: str, patients: str = str(PATIENTS)) -> None:
    """Write the images and data lists.

    Args:
        source: folder ``provided-data`` of OpenKBP.
        out: folder to write to.
        patients: YAML file of the patients' numbers in the lists pretraining, training and validation.

    Raises:
        FileNotFoundError: listing all patients that ``source`` lacks.
    """
    lists = yaml.safe_load(Path(patients).read_text(encoding="utf-8"))
    lists = {name: sorted(f"pt_{number}" for number in numbers) for name, numbers in lists.items()}
    found = {folder.name: folder for folder in Path(source).glob("*-pats/pt_*") if (folder / "ct.csv").is_file()}
    missing = [patient for names in lists.values() for patient in names if patient not in found]
    if missing:
        raise FileNotFoundError(
            f"{source} lacks ct.csv of {len(missing)} patients: {', '.join(missing)}. Give the folder provided-data of "
            "a complete clone."
        )
    scans, cases = Path(out) / "openkbp_ssl", Path(out) / "openkbp_seg"
    pretraining = [_write(found[patient], scans, False) for patient in tqdm(lists.pop("pretraining"), "pretraining")]
    labelled = {
        name: [_write(found[patient], cases, True) for patient in tqdm(patients, name)]
        for name, patients in lists.items()
    }
    _write_list(scans, training=pretraining)
    _write_list(cases, labels={str(value): organ for value, organ in enumerate(("background", *ORGANS))}, **labelled)


def _write(patient: Path, folder: Path, labelled: bool) -> dict[str, object]:
    """Write a patient's scan, and its label map too, and return the entry of the data list."""
    scan, labels, contoured = read_patient(patient)
    images = {"image": scan, "label": labels} if labelled else {"image": scan}
    paths = {kind: f"{kind}s/{patient.name}.nii.gz" for kind in images}
    for kind, image in images.items():
        (folder / paths[kind]).parent.mkdir(parents=True, exist_ok=True)
        nib.save(image, folder / paths[kind])
    return {**paths, "organs_contoured": contoured} if labelled else paths


def _write_list(folder: Path, **content: object) -> None:
    text = json.dumps({"name": folder.name, "modality": {"0": "CT"}, **content}, indent=2)
    (folder / "dataset.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    fire.Fire(prepare)
