"""results/REPORT.md: the text in report.md with the figures filled in, made of the runs that have ended.

A section with `<!-- STUDY … -->` is filled in when all runs of these studies have ended; until then it says how many
have. In it {table} is the first study's table and {claims} that of its claims. {loss[STUDY][LABEL]} is a mean loss,
{difference[CLAIM]} and {verdict[CLAIM]} are a claim's. SCALE/losses is a study at another scale.
"""

import re
from pathlib import Path
from typing import Any

from studies import losses
from studies.claims import Claim, in_words, verdicts
from studies.groups import markdown_table, table
from studies.runs import Ledger, Plan
from studies.scales import SCALES, Scale

TEMPLATE = Path(__file__).parent / "report.md"


def text(studies: dict[str, Any], results: Path) -> str:
    known = {name: Known(study, Ledger(results / "runs.jsonl"), SCALES["laptop"]) for name, study in studies.items()}
    for scale in ("short", "quickstart"):
        known[f"{scale}/losses"] = Known(losses, Ledger(results / scale / "runs.jsonl"), SCALES[scale])
    claims = [claim for name, study in known.items() if "/" not in name for claim in study.claims]
    values = {
        "difference": {claim.name: in_words(claim) for claim in claims},
        "verdict": verdicts(claims),
        "loss": {name: study.means() for name, study in known.items() if study.ended},
    }
    sections = re.split(r"^(?=## )", TEMPLATE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return "".join(filled(section, known, values) for section in sections)


class Known:
    """A study with those of its runs that have ended."""

    def __init__(self, study: Any, ledger: Ledger, scale: Scale):
        self.study, self.scale, self.plan = study, scale, Plan(ledger)
        self.groups = study.groups(self.plan, scale)
        self.wanted, self.missing = len(self.plan.wanted), len(self.plan.missing)
        self.ended = not self.missing
        self.claims = study.claims(self.groups) if self.ended and scale.axes else []

    def means(self) -> dict[str, str]:
        return {label: f"{losses.losses(group).mean():.3f}" for label, group in self.groups.items()}

    def markdown(self) -> str:
        parts = [getattr(self.study, "markdown", table)(self.groups)]
        if self.study is losses and self.scale.axes:
            parts.insert(0, losses.search_table(losses.searches(self.plan, self.scale)))
        return "\n\n".join(parts)


def filled(section: str, known: dict[str, Known], values: dict[str, Any]) -> str:
    match = re.search(r"^<!-- (.+) -->\n", section, flags=re.MULTILINE)
    if not match:
        return section
    studies, heading = [known[name] for name in match[1].split()], section[: match.start()]
    for study in studies:
        if not study.ended:
            return f"{heading}Not done yet: {study.wanted - study.missing} of {study.wanted} runs have ended.\n\n"
    claims = claims_table(studies[0].claims, values["verdict"])
    return heading + section[match.end() :].format(table=studies[0].markdown(), claims=claims, **values)


def claims_table(claims: list[Claim], words: dict[str, str]) -> str:
    rows = []
    for claim in claims:
        bounds = f"{claim.confirmed_below:+.4f}", f"{claim.refuted_above:+.4f}"
        rows.append([claim.text, len(claim.difference), in_words(claim), *bounds, words[claim.name]])
    header = "claim | seeds | mean difference (95 % interval) | confirmed below | refuted above | answer"
    return markdown_table(header, rows)
