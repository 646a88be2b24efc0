"""Unit test of the bundle pgl_pretrain, for the Model Zoo, run by its ``ci/unit_tests/runner.py``.

Trains one epoch on random volumes, and writes dense features with the encoder that this leaves behind.
"""

import os
import tempfile
import unittest

import nibabel as nib
import numpy as np
from monai.bundle import ConfigWorkflow
from utils import check_workflow

BUNDLE = "models/pgl_pretrain"
TRAINING = {
    "encoder#layers": [1, 1, 1, 1],
    "encoder#block": "basic",
    "encoder#widen_factor": 0.125,
    "hidden_channels": 32,
    "out_channels": 16,
    "view_size": [32, 32, 16],
    "validation_fraction": 0.3,
    "batch_size": 2,
    "max_epochs": 1,
    "warmup_epochs": 0,
    "num_workers": 0,
}


class TestPretraining(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.dataset_dir = os.path.join(folder.name, "scans")
        self.output_dir = os.path.join(folder.name, "output")
        os.makedirs(self.dataset_dir)
        for number in range(3):
            voxels = np.random.default_rng(number).normal(0, 300, (48, 44, 24)).astype(np.float32)
            nib.save(nib.Nifti1Image(voxels, np.eye(4)), os.path.join(self.dataset_dir, f"scan{number}.nii.gz"))

    def workflow(self, name, workflow_type, **overrides):
        configs = os.path.join(BUNDLE, "configs")
        return ConfigWorkflow(
            config_file=os.path.join(configs, name),
            meta_file=os.path.join(configs, "metadata.json"),
            logging_file=os.path.join(configs, "logging.conf"),
            workflow_type=workflow_type,
            bundle_root=BUNDLE,
            dataset_dir=self.dataset_dir,
            **overrides,
        )

    def test_train_and_infer(self):
        training = self.workflow("train.json", "train", output_dir=self.output_dir, **TRAINING)
        check_workflow(training, check_properties=True)
        encoder = os.path.join(self.output_dir, "models", "pgl_encoder.pt")
        assert os.path.isfile(encoder)

        features = os.path.join(self.output_dir, "features")
        inference = self.workflow("inference.json", "infer", output_dir=features, pretrained_encoder=encoder)
        check_workflow(inference, check_properties=True)
        for number in range(3):
            image = nib.load(os.path.join(features, f"scan{number}_features.nii.gz"))
            assert image.shape == (3, 3, 3, 64)


if __name__ == "__main__":
    unittest.main()
