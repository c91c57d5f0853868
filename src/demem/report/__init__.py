"""What people look at: one HTML file that says what was found, what was done about it, and how it can be seen.

:class:`ReportData` holds what is known of a run, as plain numbers, words and small pictures; :func:`save` and
:func:`load` take it to JSON and back.  :func:`render` makes the page of it, :func:`summarise` the five lines at the end
of a fit.  Nothing here knows a Trainer; :mod:`demem.run` reads a run into the data.
"""

from demem.report.content import look_at, picture
from demem.report.facts import (
    Content,
    ExampleFacts,
    GroupFacts,
    LayerChange,
    ReportData,
    ReportOptions,
    Touched,
    UnitFacts,
    VerdictFacts,
    load,
    save,
    touched_by_forgetting,
)
from demem.report.figures import diversity_curves, example_sheet, svg, unit_map
from demem.report.files import check_writable, write_whole
from demem.report.render import percent, render
from demem.report.words import (
    Words,
    actions,
    average,
    contradiction,
    evidence,
    gap,
    group_word,
    outcome,
    reason,
    summarise,
    verdict_words,
    worst,
)

__all__ = [
    "Content",
    "ExampleFacts",
    "GroupFacts",
    "LayerChange",
    "ReportData",
    "ReportOptions",
    "Touched",
    "UnitFacts",
    "VerdictFacts",
    "Words",
    "actions",
    "average",
    "check_writable",
    "contradiction",
    "diversity_curves",
    "evidence",
    "example_sheet",
    "gap",
    "group_word",
    "load",
    "look_at",
    "outcome",
    "percent",
    "picture",
    "reason",
    "render",
    "save",
    "summarise",
    "svg",
    "touched_by_forgetting",
    "unit_map",
    "verdict_words",
    "worst",
    "write_whole",
]
