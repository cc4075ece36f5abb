"""Have MLPerf's load generator ask one system: `python -m edgemuse.bench.measure.loadgen JOB RESULT`.

A sample is a scan on disk. The answer is the bytes of its label map, which is written to disk first. So the whole way
of a scan is measured, where MLPerf's own 3D-UNet begins with a preprocessed array in memory. Each scenario is run
twice, for accuracy and for time. The logs lie in the job's output, under SCENARIO/MODE.
"""

from __future__ import annotations

import array
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlperf_loadgen as lg

from edgemuse.bench.measure.worker import Job, Stages, family
from edgemuse.runtime.scan.nifti import scan_stem

RESULTS = {"SingleStream": "result_90.00_percentile_latency_ns", "Offline": "result_samples_per_second"}
"""The figure that MLPerf takes of each scenario, by its name in the log."""
MODES = ("AccuracyOnly", "PerformanceOnly")
DETAIL = "mlperf_log_detail.txt"
FEWEST_QUERIES = 5
"""How many scans a performance run asks for at least; if there are fewer, it asks for some again."""


def run(scenario: str, mode: str, samples: int, answer: Callable[[int], bytes], folder: Path) -> None:
    """Have LoadGen ask for `samples` samples; its logs go into `folder`. Raises what `answer` raised."""
    errors: list[Exception] = []

    def issue(queries: Sequence[Any]) -> None:
        for query in queries:
            data = b""
            try:
                data = answer(query.index)
            except Exception as error:  # LoadGen would end the process without a word
                errors.append(error)
            buffer = array.array("B", data)
            lg.QuerySamplesComplete([lg.QuerySampleResponse(query.id, *buffer.buffer_info())])

    folder.mkdir(parents=True)
    system = lg.ConstructSUT(issue, lambda: None)
    library = lg.ConstructQSL(samples, samples, lambda indices: None, lambda indices: None)
    lg.StartTestWithLogSettings(system, library, _settings(scenario, mode, samples), _logs(folder), "")
    lg.DestroyQSL(library)
    lg.DestroySUT(system)
    if errors:
        raise errors[0]


def _settings(scenario: str, mode: str, samples: int) -> Any:
    settings = lg.TestSettings()
    settings.scenario, settings.mode = getattr(lg.TestScenario, scenario), getattr(lg.TestMode, mode)
    settings.min_duration_ms = 0
    settings.min_query_count = max(samples, FEWEST_QUERIES)
    if scenario == "SingleStream":
        settings.max_query_count = settings.min_query_count
    return settings


def _logs(folder: Path) -> Any:
    output = lg.LogOutputSettings()
    output.outdir, output.copy_summary_to_stdout = str(folder), False
    settings = lg.LogSettings()
    settings.log_output, settings.enable_trace = output, False
    return settings


def read_log(path: Path) -> dict[str, Any]:
    """The values in LoadGen's detailed log, the last of each key."""
    entries = (json.loads(line.partition(" ")[2]) for line in path.read_text().splitlines() if line.startswith(":::"))
    return {entry["key"]: entry["value"] for entry in entries}


def main() -> None:
    """Run every scenario on the job of the command line; the first accuracy run warms the system up."""
    job = Job(**json.loads(sys.argv[1]))
    output = Path(job.output)
    with family(job)(job, Stages()) as segment:

        def answer(index: int) -> bytes:
            scan = Path(job.scans[index])
            segment(scan)
            return (output / f"{scan_stem(scan)}_dseg.nii.gz").read_bytes()

        content = {}
        for scenario, key in RESULTS.items():
            for mode in MODES:
                run(scenario, mode, len(job.scans), answer, output / scenario / mode)
            log = read_log(output / scenario / MODES[1] / DETAIL)
            content[scenario] = {
                "result": log[key] / (1e9 if key.endswith("_ns") else 1),
                "queries": max(log["result_query_count"], log["generated_samples_per_query"]),
                "valid": log["result_validity"] == "VALID",
                "loadgen": log["loadgen_version"],
            }
    Path(sys.argv[2]).write_text(json.dumps(content))


if __name__ == "__main__":
    main()
