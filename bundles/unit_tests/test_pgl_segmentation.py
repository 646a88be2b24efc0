"""Unit test of the bundle pgl_segmentation, for the Model Zoo, run by its ``ci/unit_tests/runner.py``.

Trains one epoch on random volumes, evaluates the model that this leaves behind, and segments with it.
"""

import os
import tempfile
import unittest

import nibabel as nib
import numpy as np
from monai.bundle import ConfigWorkflow
from utils import check_workflow

BUNDLE = "models/pgl_segmentation"
TRAINING = {
    "organs": {"liver": 1, "spleen": 2},
    "encoder": {"layers": [1, 1, 1, 1], "block": "basic", "widen_factor": 0.125},
    "network_def#aspp_channels": 16,
    "network_def#decoder_channels": [16, 8, 8],
    "patch_size": [32, 32, 16],
    "patches_per_case": 1,
    "batch_size": 2,
    "max_epochs": 1,
    "num_workers": 0,
    "validation_fraction": 0.2,
}


class TestSegmentation(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.dataset_dir = os.path.join(folder.name, "cases")
        self.output_dir = os.path.join(folder.name, "output")
        for number in range(3):
            labels = np.random.default_rng(number).integers(0, 3, (40, 36, 20)).astype(np.uint8)
            voxels = (100 * labels).astype(np.float32)
            for name, array in (("images", voxels), ("labels", labels)):
                os.makedirs(os.path.join(self.dataset_dir, name), exist_ok=True)
                path = os.path.join(self.dataset_dir, name, f"case{number}.nii.gz")
                nib.save(nib.Nifti1Image(array, np.eye(4)), path)

    def workflow(self, name, workflow_type, **overrides):
        configs = os.path.join(BUNDLE, "configs")
        return ConfigWorkflow(
            config_file=os.path.join(configs, name),
            meta_file=os.path.join(configs, "metadata.json"),
            logging_file=os.path.join(configs, "logging.conf"),
            workflow_type=workflow_type,
            bundle_root=BUNDLE,
            **overrides,
        )

    def test_train_evaluate_and_infer(self):
        training = self.workflow(
            "train.json", "train", dataset_dir=self.dataset_dir, output_dir=self.output_dir, **TRAINING
        )
        check_workflow(training, check_properties=True)
        model = os.path.join(self.output_dir, "models", "model.pt")
        assert os.path.isfile(model)

        evaluation = os.path.join(self.output_dir, "evaluation")
        check_workflow(
            self.workflow(
                "evaluate.json",
                "eval",
                data_list_file_path=os.path.join(self.output_dir, "split.json"),
                data_list_key="validation",
                output_dir=evaluation,
                model_path=model,
            ),
            check_properties=True,
        )
        assert os.path.isfile(os.path.join(evaluation, "cases.csv"))

        out = os.path.join(self.output_dir, "segmentations")
        images = os.path.join(self.dataset_dir, "images")
        inference = self.workflow("inference.json", "infer", dataset_dir=images, output_dir=out, model_path=model)
        check_workflow(inference, check_properties=True)
        for number in range(3):
            labels = nib.load(os.path.join(out, f"case{number}_seg.nii.gz"))
            assert labels.shape == (40, 36, 20)


if __name__ == "__main__":
    unittest.main()
