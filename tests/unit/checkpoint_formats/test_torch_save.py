"""Where torch.save put the numbers; other things are refused, and nothing that a file names is run."""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path

import pytest
import torch

from megatron_parallel_r1.checkpoint_formats.torch_save import NotContiguous, locate_tensor


def saved(what: object, before: bytes = b"") -> tuple[io.BytesIO, int, int]:
    """A file in which something was saved behind other bytes; with where, and how long it is."""
    file = io.BytesIO()
    torch.save(what, file)
    return io.BytesIO(before + file.getvalue() + b"behind"), len(before), len(file.getvalue())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64])
@pytest.mark.parametrize("shape", [(5, 7), (3,), (2, 3, 4), ()])
def test_the_numbers_are_where_it_says(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.randn(shape).to(dtype)
    file, begin, length = saved(tensor, b"x" * 777)
    found = locate_tensor(file, begin, length)
    assert (found.dtype, found.shape) == (dtype, shape)
    held = bytearray(file.getvalue()[found.begin : found.begin + tensor.nbytes])
    assert torch.equal(torch.frombuffer(held, dtype=dtype).view(shape), tensor)


def test_a_view_and_a_parameter_are_found() -> None:
    whole = torch.arange(20.0).view(5, 4)
    for tensor in (whole[2:4], torch.nn.Parameter(whole[1:])):
        file, begin, length = saved(tensor)
        found = locate_tensor(file, begin, length)
        held = bytearray(file.getvalue()[found.begin : found.begin + tensor.nbytes])
        assert torch.equal(torch.frombuffer(held, dtype=torch.float32).view(found.shape), tensor)


def test_without_check_sums() -> None:
    torch.serialization.set_crc32_options(False)
    try:
        file, begin, length = saved(torch.ones(3))
    finally:
        torch.serialization.set_crc32_options(True)
    assert locate_tensor(file, begin, length).shape == (3,)


class Runs:
    """What a hostile file would have run."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (Path.touch, (Path("touched"),))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ([torch.ones(2)], "a list, not a tensor"),
        (Runs(), "not a plain tensor"),
        (torch.ones(2).to_sparse(), "not a plain tensor"),
    ],
)
def test_others_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: object, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(pickle.UnpicklingError, match=message):
        locate_tensor(*saved(what))
    assert not list(tmp_path.iterdir())


def test_a_transposed_tensor_is_refused() -> None:
    with pytest.raises(NotContiguous, match=r"its strides are \(1, 3\)"):
        locate_tensor(*saved(torch.ones(4, 3).t()))


def test_a_cut_file_is_damaged() -> None:
    file, begin, length = saved(torch.ones(300))
    for less in range(1, length, 37):
        with pytest.raises((zipfile.BadZipFile, pickle.UnpicklingError)):
            locate_tensor(io.BytesIO(file.getvalue()[: length - less]), begin, length - less)
