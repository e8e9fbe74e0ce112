"""The figures of a run, a file per section of the report; MLflow is given the same ones."""
