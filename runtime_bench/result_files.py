"""Reads result files of every kind, as `gate` and `report` take them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter

from runtime_bench import results
from runtime_bench.gpu import GpuResult
from runtime_bench.layers import LayersResult
from runtime_bench.results import RunResult
from runtime_bench.rivals import RivalsResult
from runtime_bench.trade_off import TradeOff

SCHEMA_FILE = Path(__file__).parent / "schema" / "result.json"

_ANY: TypeAdapter[Any] = TypeAdapter(
    Annotated[RunResult | LayersResult | GpuResult | TradeOff | RivalsResult, Field(discriminator="kind")]
)


def load(path: Path) -> Any:
    """The result in `path`, of whatever kind. Raises ResultError, naming the file and what is wrong."""
    return results.read(path, _ANY)


def schema() -> str:
    """The JSON schema of every kind of result, as it stands in SCHEMA_FILE."""
    return json.dumps(_ANY.json_schema(), indent=1) + "\n"
