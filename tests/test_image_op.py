"""`_C.image_to_tensor` against exact arithmetic: every byte value, odd sizes, odd addresses."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch

from cosmos3_fast import _C, ops
from cosmos3_fast.kernels import reference

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SHAPES = [(1, 1, 1, 3), (1, 1, 21, 3), (2, 5, 7, 3), (3, 17, 63, 3), (1, 480, 832, 3)]


def random_frames(shape: tuple[int, ...], device: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).to(device)


def run(frames: torch.Tensor, out: torch.Tensor, count: int) -> None:
    stream = torch.cuda.current_stream().cuda_stream if frames.is_cuda else 0
    device = frames.get_device()  # -1 on the CPU
    _C.image_to_tensor(frames.data_ptr(), out.data_ptr(), count, device, stream)


@pytest.mark.parametrize("device", DEVICES)
def test_every_byte_is_the_division_and_the_difference_each_rounded_once(device):
    frames = torch.arange(256, dtype=torch.uint8, device=device)
    out = torch.full((256,), torch.nan, device=device)
    run(frames, out, 256)
    # Rounding the exact quotient through float64 is safe: 24 bits are decided long before bit 53.
    quotients = [np.float32(float(Fraction(2 * value, 255))) for value in range(256)]
    assert out.tolist() == [float(quotient - np.float32(1)) for quotient in quotients]
    assert (out[0].item(), out[255].item()) == (-1.0, 1.0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_frames_become_the_reference_bit_for_bit_in_channels_last_memory(shape, device):
    frames = random_frames(shape, device)
    out = ops.image_to_tensor(frames)
    assert out.dtype == torch.float32 and out.device.type == device
    assert out.permute(1, 2, 3, 0).is_contiguous()
    # torch divides on CUDA by multiplying with the reciprocal: the truth is the CPU's division.
    assert torch.equal(out.cpu(), reference.image_to_tensor(frames.cpu()))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(3, 4, 6, 3), (4, 63, 5, 3)], ids=str)
def test_frames_that_are_a_strided_view(shape, device):
    frames = random_frames(shape, device)
    for view in (frames[:, ::2, 1:], frames.flip(0)[1:], frames.transpose(1, 2)):
        expected = reference.image_to_tensor(view.cpu())
        assert torch.equal(ops.image_to_tensor(view).cpu(), expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 63, 1000, 300_001])
@pytest.mark.parametrize(("skip_in", "skip_out"), [(0, 0), (1, 0), (0, 1), (3, 3), (4, 4)], ids=str)
def test_addresses_need_no_alignment_and_nothing_else_is_written(skip_in, skip_out, count, device):
    frames = random_frames((count + skip_in,), device)
    out = torch.full((count + skip_out + 1,), torch.nan, device=device)
    run(frames[skip_in:], out[skip_out:], count)
    assert torch.equal(out[skip_out:-1].cpu(), frames[skip_in:].cpu().float() / 127.5 - 1)
    assert out[:skip_out].isnan().all() and out[-1].isnan()


@pytest.mark.parametrize("device", DEVICES)
def test_no_frames_are_no_work(device):
    assert ops.image_to_tensor(random_frames((0, 4, 4, 3), device)).shape == (3, 0, 4, 4)


@pytest.mark.parametrize(
    ("frames", "expected"),
    {
        "float": (torch.zeros(1, 2, 2, 3), r"torch\.float32 \[1, 2, 2, 3\]"),
        "channels-first": (torch.zeros(1, 3, 4, 4, dtype=torch.uint8), r"\[1, 3, 4, 4\]"),
        "one-image": (torch.zeros(4, 4, 3, dtype=torch.uint8), r"\[4, 4, 3\]"),
    }.values(),
    ids=["float", "channels-first", "one-image"],
)
def test_other_tensors_are_refused_by_shape_and_dtype(frames, expected):
    with pytest.raises(ValueError, match=r"uint8 \[T, H, W, 3\], got .*" + expected):
        ops.image_to_tensor(frames)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((16, 16, -1), "negative, got -1"), ((0, 16, 1), "null"), ((16, 0, 1), "null")],
    ids=["negative-count", "null-frames", "null-out"],
)
def test_a_failed_check_names_file_and_line(arguments, message):
    with pytest.raises(RuntimeError, match=rf"{message}.* \(image\.cpp:\d+\)"):
        _C.image_to_tensor(*arguments, -1, 0)


def test_a_gpu_that_is_not_there_is_an_error_and_not_a_crash():
    frames, out = torch.zeros(4, dtype=torch.uint8), torch.full((4,), torch.nan)
    message = "cuda[GS]etDevice" if _C.has_cuda else "no CUDA kernels"
    with pytest.raises(RuntimeError, match=rf"{message}.* \((common\.h|image\.cpp):\d+\)"):
        _C.image_to_tensor(frames.data_ptr(), out.data_ptr(), 4, 4096, 0)
    assert out.isnan().all()


@pytest.mark.gpu
def test_it_runs_on_the_given_stream_alone_and_can_be_captured():
    frames, out = random_frames((3, 17, 63, 3), "cuda"), torch.full((3 * 17 * 63 * 3,), torch.nan)
    out = out.cuda()
    run(frames, out, out.numel())  # once before the capture
    out.fill_(torch.nan)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(frames, out, out.numel())
    assert out.isnan().all()
    frames.copy_(255 - frames)
    graph.replay()
    assert torch.equal(out.view(frames.shape).cpu(), frames.cpu().float() / 127.5 - 1)


@pytest.mark.gpu2
def test_the_call_sets_its_device_itself_and_puts_torchs_back():
    frames = random_frames((2, 5, 7, 3), "cuda:1")
    with torch.cuda.device(0):
        out = ops.image_to_tensor(frames)
        # The current device is torch's own again: this kernel runs on the first GPU.
        after = torch.ones(5, device="cuda") + 1
    assert (out.device.index, after.device.index) == (1, 0)
    assert torch.equal(out.cpu(), reference.image_to_tensor(frames.cpu()))
    assert after.tolist() == [2.0] * 5
