"""The best autoencoder of each group in MLflow's model registry, under an alias."""

from collections.abc import Mapping

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

ALIAS = "best"


def model_name(experiment: str, group: int) -> str:
    """One registered model for a group of all runs of an experiment."""
    return f"{experiment}-g{group}"


def register_best(client: MlflowClient, model: str, run_id: str, tags: Mapping[str, str]) -> None:
    """Have the alias point to the autoencoder of a trial's run; its version is made only once."""
    try:
        client.create_registered_model(model)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    found = client.search_model_versions(f"name = '{model}' and run_id = '{run_id}'")
    if found:
        version = found[0]
    else:
        source = f"{client.get_run(run_id).info.artifact_uri}/sae"
        version = client.create_model_version(model, source, run_id, tags=dict(tags))
    client.set_registered_model_alias(model, ALIAS, str(version.version))
