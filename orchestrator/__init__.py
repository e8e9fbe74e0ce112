"""The roof: wires actors to Ray, Tune, MLflow and YAML, and drives a run. Nothing imports it."""
