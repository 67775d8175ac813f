"""Memory in which the programs of one launch meet: counters, zero before and after every launch, and partial sums.

One workspace serves all launches on a stream. None is kept in the pool of a CUDA graph: Inductor raises over what stays
there, and replays may run beside anything.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

_kept: dict[tuple[str, torch.device, int], Tensor] = {}


def workspace(kind: str, words: int, zeros: int, device: torch.device, stream: int) -> Tensor:
    """At least ``words`` 32-bit words for a launch on ``stream``, the current one, which finds and leaves the first
    ``zeros`` of them zero. Launches of one ``kind`` share theirs.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        fresh = torch.empty(words, dtype=torch.int32, device=device)  # the graph's, and free again after the launch
        fresh[:zeros].zero_()
        return fresh
    kept = _kept.get((kind, device, stream))
    if kept is None or kept.numel() < words:
        if kept is not None and device.type == "cuda":
            kept.record_stream(torch.cuda.current_stream(device))  # launches that use it may be under way
        kept = _kept[kind, device, stream] = _outside_of_graphs(words, device)
    return kept


def _outside_of_graphs(words: int, device: torch.device) -> Tensor:
    """Zeros that no graph's pool has a part in: Inductor's warm-up takes all that its own thread allocates from there.

    On a stream of torch's, since the default one gets into the way of captures elsewhere.
    """
    if device.type != "cuda":
        return torch.zeros(words, dtype=torch.int32, device=device)

    def allocate() -> Tensor:
        with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream(device)):
            fresh = torch.zeros(words, dtype=torch.int32, device=device)
            torch.cuda.current_stream(device).synchronize()
            return fresh

    with ThreadPoolExecutor(1) as other:
        return other.submit(allocate).result()
