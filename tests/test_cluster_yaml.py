"""cluster.yaml holds against the schema of the pinned Ray."""

from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.filterwarnings("ignore")
def test_cluster_yaml_is_valid_for_the_pinned_ray():
    from ray.autoscaler._private import util

    config = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    util.validate_config(util.prepare_config(config))
    with pytest.raises(Exception, match="hed_node_type"):
        util.validate_config({**config, "hed_node_type": "head"})
