"""Whole streams as files."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from harness.verdict.streams import Stream, StreamWriter


def write_stream(path: Path, stream: Stream) -> Path:
    with StreamWriter(path, **asdict(stream.info)) as writer:
        for sequence in stream.sequences:
            writer.put(sequence)
    return path
