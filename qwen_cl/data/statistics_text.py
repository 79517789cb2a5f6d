"""Data report as text: a summary for the terminal, a page for the run folder. No torch."""

from __future__ import annotations

from qwen_cl.data.fingerprints import GRAM
from qwen_cl.data.leakage import NearPairs
from qwen_cl.data.statistics import DataReport

BAR = 40
SHOWN = "Rows as they are trained on; tokens in [[ ]] are not in the loss:"


def summary(report: DataReport) -> list[tuple[str, str]]:
    """Return the name and text of each summary line."""
    what = "documents" if report.documents else "rows"
    way = "packed" if report.packing else "unpacked"
    rows = (
        f"{report.rows:,} {what}, {report.tokens:,} tokens, {report.labels:,} loss tokens; median length "
        f"{report.lengths['median']:,}, longest {report.lengths['max']:,}"
    )
    losses = [f"{report.sequences[way]:,} sequences, {report.padding[way]:.0%} padding"]
    if report.packing and not report.documents:
        losses[0] += f" (unpacked {report.sequences['unpacked']:,}, {report.padding['unpacked']:.0%})"
    if not report.documents:
        losses.append(f"{report.truncated:,} rows truncated, {report.truncated_labels:,} loss tokens lost")
    if report.without_labels:
        losses.append(f"{report.without_labels:,} left out, without loss tokens")
    losses.append(f"{report.duplicates:,} duplicates")
    if report.overlap is not None and report.overlap.found:
        losses.append(
            f"{report.overlap.found:,} of {report.overlap.texts:,} validation {what} are also in the training set"
        )
    for name, overlap in report.retention_overlap.items():
        if overlap.found:
            losses.append(f"{overlap.found:,} of {overlap.texts:,} rows of retention.eval_sets.{name} are trained on")
    lines = [("training set", rows), ("", "; ".join(losses)), ("", _writing(report, what))]
    lines += [("near duplicates", _near(pairs)) for pairs in report.near_duplicates if pairs.count]
    return lines + ([("", _unused(report))] if report.unused_fields else [])


def _near(pairs: NearPairs) -> str:
    done = "moved to training" if pairs.moved else "still evaluated"
    shown = ", ".join(f"{measured} ({trained})" for measured, trained in pairs.examples)
    return (
        f"{pairs.count:,} of {pairs.of:,} {pairs.what} are near duplicates of training texts (more than half of their "
        f"{GRAM}-grams), {done}: {shown}{', …' if pairs.count > len(pairs.examples) else ''}"
    )


def _unused(report: DataReport) -> str:
    sets = []
    for name, counts in report.unused_fields.items():
        shown = ", ".join(f"{field} ({count:,} rows)" for field, count in counts.items())
        sets.append(f"in {name} {shown}")
    return "unused fields: " + "; ".join(sets)


def _writing(report: DataReport, what: str) -> str:
    of = "" if report.sampled is None else f" of a sample of {report.sampled:,} {what}"
    return f"characters{of}: " + ", ".join(f"{name} {share:.1%}" for name, share in report.writing.items())


def report_page(report: DataReport) -> str:
    lines = [f"{name:>16}  {text}" for name, text in summary(report)]
    what = "document" if report.documents else "row"
    lines += ["", f"Tokens per {what}: " + ", ".join(f"{name} {value:,}" for name, value in report.lengths.items())]
    most = max(count for _, _, count in report.histogram)
    for first, last, count in report.histogram:
        bar = "#" * -(-BAR * count // most)
        lines.append(f"{first:>9,} to {last:>9,}  {count:>9,}  {bar}".rstrip())
    lines += ["", "Documents, from their start:" if report.documents else SHOWN]
    for number, text in enumerate(report.rendered, start=1):
        lines += ["", f"--- {number}", text]
    return "\n".join(lines) + "\n"
