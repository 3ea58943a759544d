"""Configurations, and ServerApp and ClientApps in one process."""

import pytest
import yaml


@pytest.fixture
def configured(tmp_path):
    """Writes a configuration; returns its path."""

    def write(*methods, clients=2, **federation):
        model = {"backbone": "vit", "backbone_options": {"depth": 2, "width": 16, "heads": 2, "patch_size": 4}}
        content = {
            "model": {"class_path": "SimCLR", "init_args": {**model, "image_size": 8, "in_channels": 1, "hidden_dim": 16, "output_dim": 8}},
            "data": {"class_path": "ImageData", "init_args": {"batch_size": 16, "num_clients": clients, "limit_train": 32 * clients}},
            "plugins": list(methods),
            "federation": {"rounds": 3, "seed": 5, "accelerator": "cpu", "progress": False, **federation},
            "loggers": [],
        }
        path = tmp_path / "small.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    return write


@pytest.fixture
def serve(tmp_path):
    """Runs the ServerApp on nodes; returns the run's folder and the grid."""
    import handed  # which needs Flower

    def run(path, nodes=({"partition-id": 1}, {"partition-id": 0}), down=(), folder="there", **options):
        return tmp_path / folder, handed.serve(path, tmp_path / folder, nodes, down, **options)

    return run
