"""MLflow's model registry: versions of models, and what they are called."""

from __future__ import annotations

from collections.abc import Mapping

from initflow.tracking import connection, delivery, mlflow_page, outbox
from initflow.tracking.logged_models import models
from initflow.tracking.outages import translated
from initflow.tracking.runs import reading


@reading()
def there(run: str, model: str) -> tuple[str, str]:
    """The ids of a run and of its model, where only keys of them are known."""
    client = connection.client()
    run = delivery.id_of(client, run)
    if model.startswith(outbox.KEY):
        found = models.logged(client, client.get_run(run))
        if not found:
            raise outbox.UnknownKeyError(f"the model of the run {run} is not there yet")
        model = str(found[0].model_id)
    return run, model


@reading()
def register(
    name: str, model_id: str, run_id: str, tags: Mapping[str, object], description: str
) -> str:
    """A new version of the model ``name`` in MLflow's registry, which is made if need be."""
    client = connection.client()
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name)
    made = client.create_model_version(
        name,
        f"models:/{model_id}",
        run_id,
        tags={key: str(value) for key, value in tags.items()},
        description=mlflow_page.plain(description),
        model_id=model_id,
    )
    return str(made.version)


@reading()
def has_version(name: str, version: str) -> bool:
    """Whether the registered model has it still."""
    versions = connection.client().search_model_versions(f"name = '{name}'")
    return any(str(one.version) == version for one in versions)


@translated()
def set_alias(name: str, alias: str, version: str) -> None:
    """Let ``models:/name@alias`` be that version of the registered model."""
    connection.client().set_registered_model_alias(name, alias, version)
