"""A fairness report as one HTML page that needs nothing else: styles and pictures are inside it."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from string import Template
from typing import TYPE_CHECKING

from fairdiff_lightning.callbacks import figures
from fairdiff_lightning.callbacks.cases import Case, Picture
from fairdiff_lightning.callbacks.fairness_summary import METRIC_NAMES, FairnessSummary
from fairdiff_lightning.callbacks.report_files import Report, to_plain
from fairdiff_lightning.callbacks.report_table import Entry, entry, headers, heading, rows, unknown_note

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { --ink: #1a1a1a; --soft: #5a5f66; --line: #e1e4e8; --tint: #f6f8fa; --accent: #0072B2; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 2.5rem 1.25rem 4rem; color: var(--ink); background: #fff;
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .4rem; letter-spacing: -.01em; }
h2 { font-size: 1.3rem; margin: 3rem 0 .9rem; padding-top: 1.1rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.8rem 0 .6rem; }
p { margin: .5rem 0; max-width: 46rem; }
.soft { color: var(--soft); font-size: .9rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .75rem; margin: 1.4rem 0; }
.card { border: 1px solid var(--line); border-radius: .5rem; padding: .8rem 1rem; background: var(--tint); }
.card b { display: block; font-size: 1.6rem; line-height: 1.3; font-variant-numeric: tabular-nums; }
.card span { display: block; color: var(--soft); font-size: .84rem; overflow-wrap: anywhere; }
.wide { overflow-x: auto; margin: 1rem 0; }
.wide img { display: block; max-width: max(100%, 34rem); height: auto; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .9rem; text-align: right; vertical-align: top; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: .2rem; font-weight: 500; }
thead th { border-bottom: 2px solid var(--ink); font-weight: 600; }
tbody tr { border-bottom: 1px solid var(--line); }
tbody + tbody { border-top: 2px solid var(--line); }
td small { display: block; color: var(--soft); font-size: .8rem; }
.cases { display: grid; grid-template-columns: repeat(auto-fill, minmax(13rem, 1fr)); gap: 1.25rem; margin: 1rem 0; }
.cases figure { margin: 0; }
.cases img { display: block; width: 100%; height: auto; border-radius: .35rem; }
figcaption { font-size: .86rem; margin-top: .4rem; overflow-wrap: anywhere; }
figcaption b { font-variant-numeric: tabular-nums; }
.key { display: inline-block; width: 1.1rem; height: .34rem; border: 1px solid #333; vertical-align: middle;
  margin: 0 .35rem 0 .1rem; }
details { margin: 1rem 0; }
summary { cursor: pointer; color: var(--accent); font-weight: 500; }
pre { overflow-x: auto; background: var(--tint); border: 1px solid var(--line); border-radius: .5rem;
  padding: 1rem; font-size: .82rem; line-height: 1.45; }
@media (max-width: 40rem) { body { padding-top: 1.5rem; } h1 { font-size: 1.5rem; } }
@media print { details { display: none; } h2 { break-after: avoid; } figure, tr { break-inside: avoid; } }
</style>
</head>
<body>
<header>
<h1>$title</h1>
<p class="soft">$subtitle</p>
</header>
<main>
<div class="cards">$cards</div>
$sections
$worst
<h2>Run</h2>
$run
</main>
</body>
</html>
""")

_READING = """<h2>How to read this</h2>
<p>Scores are fractions: 1 is perfect. A score of a group is the mean over its images; images where a class is not
defined are left out. <b>ES</b> is the equity-scaled score: the overall score divided by one plus the sum of the
groups' distances from it. <b>ES-std</b> divides by one plus the groups' standard deviation instead. Both equal the
overall score when all groups score alike, and are lower the more the groups differ. Class means are means of the
classes' statistics.</p>
<p>Intervals are percentile bootstrap intervals: images are drawn again within their groups. A dash stands where
there are fewer than two images to draw from.</p>
"""


def page(report: Report) -> str:
    """Render a report; all text that comes from data is escaped."""
    run = report.run
    subtitle = f"{run['module']} · {len(report.cases)} test images · {run['date']}"
    return _PAGE.substitute(
        title=escape(report.title),
        subtitle=escape(subtitle),
        cards=_headline(report),
        sections="\n".join([*(_section(report, summary) for summary in report.summaries), *_subsets(report)]),
        worst=_worst(report) + _READING,
        run=_run(report),
    )


def _headline(report: Report) -> str:
    first = report.summaries[0]
    cards = [_card(f"{label}, all images", entry(first.cell(0, metric))) for metric, label in METRIC_NAMES.items()]
    cards += [
        _card(f"ES-Dice, {s.attribute}", entry(s.statistic("es", "dice"))) for s in report.summaries if s.compares
    ]
    return "".join(cards)


def _section(report: Report, summary: FairnessSummary) -> str:
    compared = _compared(summary) if summary.compares else ""
    return f"""<section>
<h2>{escape(heading(summary))}</h2>
{compared}
<div class="wide">{_table(summary)}</div>
{_paragraph(unknown_note(summary))}
{_counts(report, summary.attribute)}
</section>"""


def _compared(summary: FairnessSummary) -> str:
    cards = [
        _card("Worst group, Dice", entry(summary.statistic("worst", "dice"), summary.worst_name("dice"))),
        _card("Largest gap of groups", entry(summary.statistic("gap", "dice"))),
        _card("Standard deviation of groups", entry(summary.statistic("std", "dice"))),
    ]
    bars = _image(_bars(summary), f"Dice of each {summary.attribute} group with intervals")
    return f"""<div class="cards">{"".join(cards)}</div>
<div class="wide">{bars}</div>
<p class="soft">Bars: mean Dice of each group with its bootstrap interval. Dashed: all images.</p>"""


def _subsets(report: Report) -> Iterator[str]:
    for name, summaries in report.subsets.items():
        tables = "".join(
            f'<h3>{escape(heading(summary))}</h3><div class="wide">{_table(summary)}</div>'
            f"{_paragraph(unknown_note(summary))}"
            for summary in summaries
        )
        yield f"<section><h2>Only {escape(name)}</h2>{tables}</section>"


def _bars(summary: FairnessSummary) -> Figure:
    groups, classes = slice(1, 1 + len(summary.groups)), slice(0, len(summary.classes) - 1)
    value, low, high = (x[groups, 0, classes] for x in (summary.value, summary.low, summary.high))
    overall = summary.value[0, 0, classes]
    names = summary.classes[classes]
    return figures.group_bars(summary.groups, summary.group_sizes, value, low, high, overall, names)


def _table(summary: FairnessSummary) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in ("", "n", *headers(summary)))
    scores: list[str] = []
    statistics: list[str] = []
    for row in rows(summary):
        cells = "".join(f"<td>{_entry(item)}</td>" for item in row.entries)
        images = "" if row.images is None else str(row.images)
        block = statistics if row.images is None else scores
        block.append(f"<tr><td>{escape(row.label)}</td><td>{images}</td>{cells}</tr>")
    bodies = "".join(f"<tbody>{''.join(block)}</tbody>" for block in (scores, statistics))
    return f"<table><thead><tr>{head}</tr></thead>{bodies}</table>"


def _counts(report: Report, attribute: str) -> str:
    splits = {split: table[attribute] for split, table in report.counts.items() if attribute in table}
    if not splits:
        return ""
    head = "".join(f"<th>{escape(name)}</th>" for name in ("", *splits))
    names = dict.fromkeys(name for table in splits.values() for name in table)
    body = "".join(
        f"<tr><td>{escape(name)}</td>{''.join(f'<td>{table.get(name, 0)}</td>' for table in splits.values())}</tr>"
        for name in names
    )
    return (
        "<h3>Images in each split</h3>"
        f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _worst(report: Report) -> str:
    if not report.worst:
        return ""
    key = "".join(
        f'<span class="key" style="background:{colour}"></span>{name} &ensp;'
        for name, colour in (("truth", figures.TRUTH), ("prediction", figures.PREDICTION))
    )
    items = "".join(_case(report, case, picture) for case, picture in report.worst)
    return f'<h2>Worst cases</h2><p class="soft">The lowest Dice. {key}</p><div class="cases">{items}</div>'


def _case(report: Report, case: Case, picture: Picture | None) -> str:
    image = ""
    if picture is not None:
        drawn = figures.overlay(picture.image, picture.truth, picture.prediction)
        image = _image(drawn, f"Contours of the truth and the prediction of {case.id}")
    names = report.summaries[0].classes
    scores = ", ".join(
        f"{name} {'-' if math.isnan(score) else f'{score:.3f}'}" for name, score in zip(names, case.dice, strict=False)
    )
    by_class = f" ({escape(scores)})" if len(case.dice) > 1 else ""
    groups = ", ".join(f"{attribute}: {group}" for attribute, group in report.group_names(case).items())
    return (
        f"<figure>{image}<figcaption><b>Dice {case.mean_dice:.3f}</b>{by_class}<br>{escape(case.id)}"
        f'<br><span class="soft">{escape(groups)}</span></figcaption></figure>'
    )


def _run(report: Report) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in report.run["versions"].items())
    settings = f"{report.run['confidence'] * 100:g}% intervals from {report.run['num_resamples']} resamples"
    logged = json.dumps(to_plain(report.logged), indent=2, ensure_ascii=False)
    return (
        f'<p class="soft">{escape(versions)}; {escape(settings)}, seed {escape(str(report.run["seed"]))}.</p>'
        + _details("Configuration", report.config)
        + (_details("Metrics logged by the run", logged) if report.logged else "")
    )


def _paragraph(text: str) -> str:
    return f'<p class="soft">{escape(text)}</p>' if text else ""


def _details(title: str, text: str) -> str:
    return f"<details><summary>{escape(title)}</summary><pre>{escape(text)}</pre></details>"


def _card(title: str, item: Entry) -> str:
    below: Iterable[str] = (text for text in (item.remark, item.interval if item.interval != "-" else "") if text)
    note = escape(" · ".join(below))
    return f'<div class="card"><span>{escape(title)}</span><b>{item.value}</b><span>{note}</span></div>'


def _entry(item: Entry) -> str:
    below: Sequence[str] = [text for text in (item.remark, item.interval) if text]
    return item.value + "".join(f"<small>{escape(text)}</small>" for text in below)


def _image(figure: Figure, description: str) -> str:
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    data = base64.b64encode(stream.getvalue()).decode("ascii")
    width = round(96 * figure.get_figwidth())
    return f'<img width="{width}" src="data:image/png;base64,{data}" alt="{escape(description)}">'
