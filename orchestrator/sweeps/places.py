"""Places of trials: nodes that prove unfit are left out, lost ones forgiven, and waiting for room has an end."""

import math
import time
from typing import Any

from ray import tune
from ray.exceptions import ActorUnavailableError, RayActorError
from ray.tune.experiment import Trial as TuneTrialState

from orchestrator.errors import UserError
from orchestrator.node_error import NodeError
from orchestrator.placement import Placement

_WITHOUT_PLACE = (TuneTrialState.PENDING, TuneTrialState.PAUSED)


class Places(tune.Callback):
    """Looks after where trials run; what it raises ends Tune, and the same trials may be given to another.

    Tune by itself waits for room for ever, tries a trial again on the node where it failed, and counts the
    loss of a node as the failure of the trials there.
    """

    def __init__(self, placement: Placement) -> None:
        """Of trials that are placed like this."""
        self._placement = placement
        self._fault: NodeError | None = None
        self._nodes: set[str] = set()
        self._left_out = set(placement.nodes.left_out)
        """When the trials' places were asked for."""
        self._ran_last = time.monotonic()

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune pickles callbacks into its own state, which nobody reads."""
        return {}

    def on_trial_recover(
        self, iteration: int, trials: list[Any], trial: TuneTrialState, **info: Any
    ) -> None:
        """A trial has failed, and is to be tried again."""
        if self._note(trial):
            trial.run_metadata.num_failures -= 1  # pyright: ignore[reportAttributeAccessIssue]

    def on_trial_error(
        self, iteration: int, trials: list[Any], trial: TuneTrialState, **info: Any
    ) -> None:
        """A trial has failed for good."""
        self._note(trial)

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """A turn of Tune's loop.

        Raises:
            NodeError: If a node can't do its part, and there are others.
            UserError: If no trial has got a place in time.
        """
        nodes = self._placement.nodes
        self._nodes = set(nodes.present())
        if self._fault is not None:
            raise self._fault
        lacks_place = any(trial.status in _WITHOUT_PLACE for trial in trials)
        for node in nodes.left_out - self._left_out if lacks_place else ():
            # Tune still asks for places as it did, and would get some there.
            raise NodeError(node, node, UserError("it was left out"))
        if any(trial.status == TuneTrialState.RUNNING for trial in trials):
            self._ran_last = time.monotonic()
        elif time.monotonic() - self._ran_last > (self._placement.patience or math.inf):
            raise self._placement.no_room()

    def _note(self, trial: TuneTrialState) -> bool:
        """Whether it failed as its node was lost."""
        error = trial.get_pickled_error()
        cause = getattr(error, "cause", None)
        if isinstance(cause, NodeError) and self._placement.has_room_without(cause.node):
            self._fault = cause
        lost = self._nodes - set(self._placement.nodes.present(now=True))
        # A process that crashes has died; one that has gone with its node is first out of reach.
        return isinstance(error, ActorUnavailableError) or (
            bool(lost) and isinstance(error, RayActorError)
        )
