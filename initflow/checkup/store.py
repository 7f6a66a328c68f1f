"""Whether MLflow's server or store answers; one that is not there is not made by asking."""

from __future__ import annotations

from initflow.checkup.finding import Finding
from initflow.core.importing import within_limit
from initflow.errors import SettingError, cause
from initflow.tracking import connection
from initflow.tracking.outages import translated

PATIENCE_S = 10.0
THEN = "start it, or set MLFLOW_TRACKING_URI to another one"  # a server
OTHERWISE = "set MLFLOW_TRACKING_URI to one that works, such as sqlite:///mlflow.db"


def look() -> Finding:
    """Its address without a password; ``answers`` is None of a store that no run has made yet."""
    where, there = connection.shown(), connection.is_there()
    problem = _problem(where) if there else ""
    facts = {
        "address": where,
        "is_served": connection.is_served(),
        "answers": not problem if there else None,
    }
    return Finding(facts, [problem] if problem else [])


def _problem(where: str) -> str:
    """Why it does not answer, and what to do; empty if it does."""
    try:
        within_limit(_ask, PATIENCE_S)
    except SettingError as error:  # says itself what would be right
        return str(error)
    except TimeoutError:
        why = f"MLflow at '{where}' does not answer within {PATIENCE_S:g} s"
    except Exception as error:  # noqa: BLE001 - whatever is wrong there
        why = cause(error)
    else:
        return ""
    return f"{why.rstrip('.')}; {THEN if connection.is_served() else OTHERWISE}"


def _ask() -> None:
    with translated():
        connection.client().search_experiments(max_results=1)
