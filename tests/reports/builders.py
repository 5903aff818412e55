"""Small records for tests; every field can be overridden by name."""

from __future__ import annotations

from typing import Any

from reports.records import BenchRow, CheckRow, Machine, NotMeasured, Report, RunInfo

CPU: dict[str, Any] = {"type": "cpu-2core", "cpu": "Some CPU", "cores": 2, "memory_gib": 7.75, "gpus": []}
GPU: dict[str, Any] = CPU | {
    "type": "nvidia-h200",
    "gpus": [{"name": "NVIDIA H200", "driver": "580.1", "memory_gib": 139.8}],
}


def a_run(**changes: Any) -> RunInfo:
    values: dict[str, Any] = {
        "command": "verify",
        "argv": ["shardproof", "verify", "a model", "--tp", "1,2"],
        "commit": "0123456789abcdef0123456789abcdef01234567",
        "dirty": False,
        "seed": 7,
        "started_at": "2026-01-31T12:00:00+00:00",
        "seconds": 61.5,
        "machine": Machine(**CPU),
        "versions": {"python": "3.12.3", "torch": "2.11.0", "nccl": "2.28.9"},
        "switches": {"allow_tf32": False, "NCCL_NVLS_ENABLE": "0"},
    }
    return RunInfo(**(values | changes))


def a_check(check: str = "weights", tp_size: int = 2, verdict: str = "pass", **changes: Any) -> CheckRow:
    values: dict[str, Any] = {
        "check": check,
        "model": "tiny-llama",
        "tp_size": tp_size,
        "fabric": "threads",
        "dtype": "float32",
        "cases": 10,
        "verdict": verdict,
        "compared": 0 if verdict in ("skipped", "error") else 1000,
        "seconds": 1.5,
        "message": "" if verdict == "pass" else f"why it is {verdict}",
    }
    return CheckRow(**(values | changes))


def a_bench(case: str = "one", tp_size: int = 1, **changes: Any) -> BenchRow:
    values: dict[str, Any] = {
        "workload": "W1",
        "case": case,
        "model": "tiny-llama",
        "engine": "shardproof",
        "tp_size": tp_size,
        "dtype": "bfloat16",
        "fabric": "threads",
        "samples": {"output_tokens_per_s": [100.0, 101.0, 99.0, 100.5, 102.0]},
    }
    return BenchRow(**(values | changes))


def a_report(*rows: CheckRow | BenchRow | NotMeasured, **changes: Any) -> Report:
    checks = [row for row in rows if isinstance(row, CheckRow)]
    benches = [row for row in rows if isinstance(row, BenchRow)]
    not_measured = [row for row in rows if isinstance(row, NotMeasured)]
    return Report(run=a_run(**changes), checks=checks, benches=benches, not_measured=not_measured)


def a_full_report() -> Report:
    """A finding with everything that could break out of a page, and one row of each other kind."""
    nasty = 'y[3] <script>alert("x")</script> & `code` | pipe\n```\nsecond line \x1b[31m \udc80'
    return a_report(
        a_check("weights", 1, fabric="solo"),
        a_check(
            "weights",
            2,
            "finding",
            message=nasty,
            rank=1,
            module="model.layers.0.mlp",
            replay="shardproof <x>",
        ),
        a_check("logits", 1, fabric="solo", error_over_budget=0.25, excused=0.0125),
        a_check("logits", 2, "finding", error_over_budget=float("inf")),
        a_check("layers", 2, kind="row", cases=4),
        a_check("layers", 2, kind="row with bias", cases=3, error_over_budget=0.5),
        a_check("kv", 2, "skipped", message="needs <2> GPUs"),
        a_check("kv", 4, "skipped", message="needs <2> GPUs"),
        a_check("lifecycle", 2, "error", message="rank 1 died", extra={"traceback": f"Traceback …\n  </details> {nasty}"}),
        a_bench(tp_size=1, fabric="solo", metrics={"bound_output_tokens_per_s": 200.0, "memory_gib": 1.5}),
        a_bench(tp_size=2, first={"output_tokens_per_s": 80.0}),
        a_bench(tp_size=1, engine="peer <&>", fabric="own"),
        *(
            a_bench(
                f"batch {size}",
                workload="decode",
                samples={"step_ms": [1.0 * size] * 5},
                axes={"batch_size": size},
            )
            for size in (1, 8, 64)
        ),
        *(NotMeasured(workload="decode", engine="vllm", tp_size=size, reason="vllm can't be imported <here>") for size in (1, 2)),
        NotMeasured(workload="decode", engine="nanovllm", case="one", tp_size=1, verdict="error", reason="7 tokens of <8> `came`",
                    traceback=f"Traceback …\n  </pre> {nasty}"),
    )
