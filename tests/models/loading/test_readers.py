"""The readers give the same bits with any number of threads, in bounded memory, or a clear error."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from qwen_cl.config.errors import UserError
from qwen_cl.models.formats.safetensors import Checkpoint
from qwen_cl.models.loading.buffers import BLOCK
from qwen_cl.models.loading.readers import Copy, read_into
from qwen_cl.reporting.console import ProgressView
from qwen_cl.training.callbacks.metrics import RunRecorder
from tests.conftest import ROOT
from tests.support.models import write_index

ROWS, COLUMNS = 3000, 1501  # several blocks, none of them even


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    values = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))
    return {"wide": values, "half": values.to(torch.bfloat16), "bias": values[0].double(), "single": values[1].half()}


@pytest.fixture
def directory(tensors: dict[str, torch.Tensor], tmp_path: Path) -> Path:
    """Write one file per tensor."""
    for name, tensor in tensors.items():
        save_file({name: tensor.contiguous()}, tmp_path / f"{name}.safetensors")
    write_index(tmp_path)
    return tmp_path


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("readers", [1, 2, 7])
def test_every_slice_has_the_bits_of_the_file(
    readers: int, dtype: torch.dtype, tensors: dict[str, torch.Tensor], directory: Path
) -> None:
    """Read each dtype of file into each dtype of parameter, directly and through the staging buffers."""
    assert tensors["wide"].nbytes > 3 * BLOCK
    places = {"wide": (3, 5, 2990, 700), "half": (0, 0, ROWS, COLUMNS), "bias": (7, 0, 1490), "single": (0, 0, COLUMNS)}
    copies, expected = [], {}
    for name, (row, column, *shape) in places.items():
        source = tensors[name][row : row + shape[0]]
        expected[name] = (source if len(shape) == 1 else source[:, column : column + shape[1]]).to(dtype)
        destination = torch.nn.Parameter(torch.full(shape, torch.nan, dtype=dtype))
        copies.append(Copy(destination.data, name, row, column))
    checkpoint, told = Checkpoint(directory), []
    read_into(copies, checkpoint, readers=readers, progress=lambda done, total: told.append((done, total)))
    for copy in copies:
        assert torch.equal(copy.destination, expected[copy.tensor]), copy.tensor
    wanted = 2990 * 700 * 4 + ROWS * COLUMNS * 2 + 1490 * 8 + COLUMNS * 2
    assert checkpoint.bytes_read == wanted
    assert told == sorted(told) and told[-1] == (wanted, wanted)


@pytest.mark.parametrize("place", [(2999, 0, 2, 1501), (0, 1500, 3, 2), (0, 0, 3)])
def test_more_than_the_tensor_holds_is_refused(place: tuple[int, ...], directory: Path) -> None:
    row, column, *shape = place
    with pytest.raises(ValueError, match=r"^wide has shape \(3000, 1501\), which does not hold "):
        read_into([Copy(torch.empty(shape), "wide", row, column)], Checkpoint(directory))


def test_a_file_cut_after_it_was_opened(directory: Path) -> None:
    checkpoint, path = Checkpoint(directory), directory / "wide.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: 2 * BLOCK + 1])
    for columns in (COLUMNS, 7):
        with pytest.raises(UserError) as refused:
            read_into([Copy(torch.empty(ROWS, columns), "wide")], checkpoint)
        assert str(refused.value) == (
            f"{path} became shorter than its header says ({2 * BLOCK + 1} bytes) after the run began; download it again"
        )


def test_a_disk_that_fails(directory: Path) -> None:
    checkpoint, path = Checkpoint(directory), directory / "half.safetensors"
    path.unlink()
    path.symlink_to("/proc/self/mem")  # its first pages are never mapped: reading there is EIO
    with pytest.raises(UserError) as refused:
        read_into([Copy(torch.empty(ROWS, COLUMNS), "half")], checkpoint)
    assert str(refused.value).startswith(f"{path} cannot be read at byte ")
    assert str(refused.value).endswith(": Input/output error; check the disk, or download it again")
    path.unlink()
    with pytest.raises(UserError) as refused:
        read_into([Copy(torch.empty(ROWS, COLUMNS), "half")], checkpoint)
    assert str(refused.value) == f"{path} cannot be read: No such file or directory"


CHILD = """
import resource, sys
from pathlib import Path
import torch
from qwen_cl.models.formats.safetensors import Checkpoint
from qwen_cl.models.loading.readers import Copy, read_into

dtype = getattr(torch, sys.argv[2])
checkpoint = Checkpoint(Path(sys.argv[1]))
parameters = {name: torch.ones(checkpoint.shape(name), dtype=dtype) for name in checkpoint.names}
warm = torch.ones(64, dtype=dtype).float()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
read_into([Copy(parameter, name) for name, parameter in parameters.items()], checkpoint)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, checkpoint.bytes_read)
"""


@pytest.mark.slow
def test_host_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """Check that the peak memory beyond the parameters is below one tensor of the model, with and without a cast."""
    size, mebibyte = 100, 2**20
    for number in range(3):
        tensor = torch.full((size * mebibyte // 2 // 1024, 1024), number, dtype=torch.bfloat16)
        save_file({str(number): tensor}, tmp_path / f"{number}.safetensors")
    write_index(tmp_path)
    for dtype in ("bfloat16", "float32"):
        done = subprocess.run(
            [sys.executable, "-c", CHILD, str(tmp_path), dtype], cwd=ROOT, capture_output=True, text=True, check=True
        )
        extra_kib, bytes_read = (int(word) for word in done.stdout.split())
        assert bytes_read == 3 * size * mebibyte
        assert extra_kib < 80 * 1024, (dtype, extra_kib)  # 8 readers at most, of two buffers of 4 MiB


def test_the_progress_of_loading_is_shown_and_a_pipe_has_one_line_of_it(tmp_path: Path) -> None:
    out = io.StringIO()
    recorder = RunRecorder(str(tmp_path), log_interval=1, val_check_interval=1, flops_per_token=1.0, flops_per_pair=1.0)
    with ProgressView(recorder.folder, max_steps=1, console=Console(file=out)) as view:
        for done in (1e9, 3.14e9, 15.2e9):
            recorder.on_weights_read(int(done), int(15.2e9))
            view.update()
    assert recorder.folder.status().phase == "loading the model: 15.2 GB of 15.2 GB"
    assert out.getvalue() == "loading the model …\n"
    recorder.on_weights_read(2_500_000, 5_000_000)
    assert recorder.folder.status().phase == "loading the model: 2.5 MB of 5.0 MB"
