"""The command `merge`, which puts the parts of --shard together."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from segdeconv.cli import evaluate, predict
from segdeconv.cli.command import ArgumentParser, local_path
from segdeconv.errors import UsageError

if TYPE_CHECKING:
    from segdeconv.inference.parts import Part

SUMMARY_FORM = {"tables": list, "classes": list, "skipped": list, "images": int, "failed": int}


def parse(description: str) -> argparse.Namespace:
    """Parse the command line."""
    parser = ArgumentParser("merge.py", description=description)
    add = parser.add_argument
    add("out", type=local_path, metavar="DIR", help="the folder that all parts wrote to with --out")
    add("--parquet", action="store_true", help="of predictions: DIR/statistics.parquet beside statistics.csv")
    add("--trust", action="append", default=[], help="of evaluations: allow a class of your own that the config names")
    return parser.parse_args()


def run(description: str) -> None:
    """Run the command: check that all parts are there and of one kind, and put them together."""
    arguments = parse(description)

    from segdeconv.inference.parts import complete_parts, remove_merged

    if arguments.out.is_dir():
        remove_merged(arguments.out)
    summaries = complete_parts(arguments.out)
    kinds = {summary.get("kind") for summary in summaries.values()}
    if kinds == {predict.KIND}:
        if arguments.trust:
            raise UsageError("--trust has no effect on parts of a prediction - leave it out")
        merge_predictions(arguments.out, summaries, parquet=arguments.parquet)
    elif kinds == {evaluate.KIND}:
        if arguments.parquet:
            raise UsageError("--parquet has no effect on parts of an evaluation - leave it out")
        evaluate.merge(arguments.out, summaries, arguments.trust)
    else:
        raise UsageError(f"{arguments.out} has parts of predict and of evaluate - give them different --out folders")


def merge_predictions(out: Path, summaries: Mapping[Part, Mapping[str, Any]], *, parquet: bool) -> None:
    """Write the progress log and the tables of a prediction whose parts are complete, and remove the parts.

    Args:
        out: The folder of predictions.
        summaries: The summary of each part.
        parquet: Write statistics.parquet.

    Raises:
        UsageError: The parts are of different networks, settings or images, lack images or their files, or some images
            could not be read.
    """
    from segdeconv.inference import parts
    from segdeconv.inference.output_folder import PROGRESS_LOG, LocalFolder
    from segdeconv.inference.outputs import PARQUET, REGIONS, STATISTICS
    from segdeconv.inference.progress_log import INPUTS, ProgressLog, difference, read_provenance
    from segdeconv.inference.tables import require_pyarrow, write_tables

    if parquet:
        require_pyarrow()
    for part, summary in summaries.items():
        if any(not isinstance(summary.get(key), form) for key, form in SUMMARY_FORM.items()):
            raise UsageError(f"part {part} has a damaged {parts.SUMMARY} - run it again")
    first = next(iter(summaries))
    tables = [
        STATISTICS,
        *([PARQUET] if parquet else []),
        *([REGIONS] if REGIONS in summaries[first]["tables"] else []),
    ]
    folder = LocalFolder(out)
    own_files = folder.own_files("--out")
    own_files.add(out / name for name in tables)
    provenances = {part: read_provenance(part.folder(out) / PROGRESS_LOG) for part in summaries}
    for part, provenance in provenances.items():
        if provenance != provenances[first]:
            raise UsageError(
                f"{out}: part {part} has predictions {difference(provenances[first], provenance)} than part {first} - "
                "run the same command for all parts, with --overwrite for those that differ"
            )
    skipped: list[str] = []
    with ExitStack() as stack:
        logs = {}
        for part, summary in summaries.items():
            log = ProgressLog(folder, provenances[part], folder=part.folder(out))
            logs[part] = stack.enter_context(closing(log))
            _require_complete(part, summary, log)
            skipped += summary["skipped"]
        whole = {key: value for key, value in provenances[first].items() if key != INPUTS}
        merged = stack.enter_context(closing(ProgressLog(folder, whole)))
        for log in logs.values():
            for name, entry in log.entries.items():
                if merged.entries.get(name) != entry:  # or else a merge that was killed has added it
                    merged.append(entry)
        own_files.record()
        files = write_tables(merged, tables, summaries[first]["classes"])
    for message in dict.fromkeys(skipped):
        print(f"{predict.SKIPPED}{message}")
    entries = [entry for log in logs.values() for entry in log.entries.values()]
    print(f"{predict.counted(entries)} of {len(logs)} parts in {out}, with {predict.listed(files)}")
    parts.remove_parts(out)
    failed = len(dict.fromkeys(skipped))
    predict.require_readable(failed, len(entries) + failed)


def _require_complete(part: Part, summary: Mapping[str, Any], log: Any) -> None:
    """Raise UsageError unless all images of a part are in its progress log, or skipped, and their outputs complete."""
    if len(log.entries) + summary["failed"] != summary["images"]:
        raise UsageError(
            f"part {part} has {len(log.entries)} of {summary['images']} images, and {summary['failed']} could not be "
            "read - run it again"
        )
    for entry in log.entries.values():
        if (path := log.missing(entry)) is not None:
            raise UsageError(f"{path} of part {part} is missing or has changed - run this part again")
