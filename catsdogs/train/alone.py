"""Ray Train with as few processes of its own as a command needs.

Its controller starts them one after the other, and each imports for seconds (2-core Zen 4, 2026-11). No setting leaves
them out.
"""

import contextlib
from collections.abc import Iterator

from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy, ScalingPolicy
from ray.train.v2.api import data_parallel_trainer
from ray.train.v2.api.config import ScalingConfig

from catsdogs.start import joins_cluster, replaced


@contextlib.contextmanager
def few_actors() -> Iterator[None]:
    """Fit without the processes that have nothing to do here; where Ray is this command's own, ask nobody for machines.

    One shares the trainer's datasets out: ours are the workers'. One frees the workers of a controller that was killed:
    they go with the command, which waited 12 s at its end, Ctrl-C too, for that process.
    """
    nothing = dict.fromkeys(("DatasetsCallback", "PlacementGroupCleanerCallback"), lambda **_: ControllerCallback())
    policy = {} if joins_cluster() else {"create_scaling_policy": _one_machine}
    with replaced(data_parallel_trainer, **nothing, **policy):
        yield


def _one_machine(scaling_config: ScalingConfig) -> ScalingPolicy:
    class OneMachine(FixedScalingPolicy):  # in here it is sent by value: the controller need not import this package
        def after_controller_start(self, *_: object) -> None:
            pass

        def _maybe_send_resource_request(self) -> None:
            pass

    return OneMachine(scaling_config)
