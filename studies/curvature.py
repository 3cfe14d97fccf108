"""Curvature: is Sophia better than the sign of its momentum? The runs are those of `losses`."""

from studies import losses
from studies.claims import Claim
from studies.groups import Groups

USE = 0.01  # nats per token: a smaller difference is of no use

groups = losses.groups


def claims(groups: Groups) -> list[Claim]:
    signum = losses.losses(groups["Signum"])
    return [
        Claim(
            f"curvature {name}",
            f"{name}'s curvature is of use: its loss less tuned Signum's",
            losses.losses(groups[name]) - signum,
            refuted_above=-USE,
            refuted_first=True,
        )
        for name in ("Sophia-G", "Sophia-H")
    ]
