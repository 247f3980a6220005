"""The step runner: its buffers carry everything that differs between requests of one shape."""

import functools

import pytest
import torch
from engine_fixtures import checkpoint, fill, ids, noise, request

from cosmos3_fast import denoise
from cosmos3_fast.config import CheckpointConfig, Cosmos3PolicyWNArgs
from cosmos3_fast.graph import CAPACITIES, Captured, ShapeKey, StepRunner, branch_range
from cosmos3_fast.latents import clean_state, flatten
from cosmos3_fast.model import Cosmos3Transformer
from cosmos3_fast.parallel import Mesh

GPU = pytest.param("cuda:0", marks=pytest.mark.gpu)
NAN = float("nan")
PROMPTS = {
    "A": {"text": ids(19), "negative": ids(7, seed=1)},
    "B": {"text": ids(33, seed=2), "negative": ids(7, seed=1), "seed": 3},
    "C": {"text": ids(2, seed=4), "negative": ids(41, seed=5), "domain_id": 1, "fps": 15.0},
}
ALONE = {"fps": 12.0, "raw_action_dim": 8, "guidance_scale": 1.5}  # in nothing else unlike A


@functools.cache
def model(device="cpu"):
    config = CheckpointConfig.read(checkpoint()).transformer
    place = torch.device(device)
    return fill(Cosmos3Transformer(config, Mesh.single(place), device=place, dtype=torch.float32))


def plan_of(asked):
    scheduler = CheckpointConfig.read(checkpoint()).scheduler
    args = Cosmos3PolicyWNArgs(schedule="native")
    schedule = denoise.schedule_of(args, scheduler, asked.num_inference_steps)
    return denoise.plan(asked, model().config, schedule)


def runner_for(asked, device="cpu", capture=False):
    plan = plan_of(asked)
    return StepRunner(plan.key, plan.layout, model(device), capture=capture)


def answer(runner, asked):
    """The whole loop of one request on a runner, as the engine runs it: a copy of the state."""
    plan, device = plan_of(asked), runner.model.device
    with torch.no_grad():
        for guided in sorted(set(plan.guided)):
            runner.prepare(guided)
        for branch in plan.branches(runner.mesh):
            prompt = plan.prompts[branch]
            runner.set_prompt(branch, prompt, runner.model.encode_prompt(prompt))
        denoise.load(runner, plan, asked)
        parts = map(torch.from_numpy, denoise.noise(plan.layout, asked.seed))
        clean = clean_state(plan.layout, asked.cond_video_latents, None, None, device)
        runner.set_state(flatten(*parts, plan.layout).to(device), clean)
        return denoise.denoise(runner, plan).cpu().clone()


def poison(runner):
    """NaN in every row of the prompts' buffers: what set_prompt does not write must not be read."""
    runner.inputs.und_k.fill_(NAN)
    runner.inputs.und_v.fill_(NAN)


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_prompts_a_b_a_on_one_runner_equal_fresh_runners(device):
    """Lengths, seed, embodiment and frame rate change in turn; capacity padding holds NaN."""
    capture = device != "cpu"
    shared = runner_for(request(**PROMPTS["A"]), device, capture)
    poison(shared)
    for name in "ABACBA":
        asked = request(**PROMPTS[name])
        fresh = runner_for(asked, device, capture)
        poison(fresh)
        got, want = answer(shared, asked), answer(fresh, asked)
        assert torch.isfinite(got).all()
        assert torch.equal(got, want), name
        fresh.close()
    shared.close()


@pytest.mark.parametrize("name", ALONE)
def test_a_field_that_changes_alone_reaches_the_runners_buffers(name):
    first, other = request(), request(**{name: ALONE[name]})
    shared = runner_for(first)
    answer(shared, first)
    assert torch.equal(answer(shared, other), answer(runner_for(other), other))
    assert torch.equal(answer(shared, first), answer(runner_for(first), first))


@pytest.mark.gpu
@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("interval", [None, (900, 1000)], ids=["always", "interval"])
def test_captured_steps_equal_eager_ones_bit_for_bit(guidance, interval):
    asked = request(guidance_scale=guidance, guidance_interval=interval, num_inference_steps=4)
    states = [answer(runner_for(asked, "cuda:0", capture), asked) for capture in (False, True)]
    assert torch.equal(*states)


@pytest.mark.gpu
def test_a_captured_call_replays_on_new_data_and_gives_its_memory_back():
    x = torch.ones(1000, device="cuda:0")
    call = Captured(lambda: x * 2, x.device, capture=True)
    assert torch.equal(call(), torch.full_like(x, 2))
    x.fill_(21)
    assert torch.equal(call(), torch.full_like(x, 42))
    call.reset()


@pytest.mark.gpu
def test_a_capture_outlives_the_process_s_workspaces():
    """torch.compile throws cuBLAS's away when it records graphs; others then get the memory."""
    x, y = (torch.randn(256, 16384, device="cuda:0").bfloat16() for _ in range(2))
    call = Captured(lambda: x @ y.t(), x.device, capture=True)
    want = call().clone()
    torch.cuda.synchronize()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    others = [torch.full((4 << 20,), 7, dtype=torch.uint8, device=x.device) for _ in range(32)]
    assert torch.equal(call(), want)
    assert all(bool((one == 7).all()) for one in others)
    call.reset()


@pytest.mark.gpu
def test_captures_that_come_and_go_leave_no_memory_behind():
    """Not even what cuBLAS keeps for a stream: 32 MiB."""
    x = torch.ones(512, 512, device="cuda:0", dtype=torch.bfloat16)

    def held() -> int:
        call = Captured(lambda: x @ x, x.device, capture=True)
        call()
        call.reset()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    first = held()
    assert [held() for _ in range(4)] == [first] * 4


@pytest.mark.gpu
def test_a_hundred_repeats_give_one_answer():
    asked = request(**PROMPTS["A"], num_inference_steps=4)
    runner = runner_for(asked, "cuda:0", capture=True)
    first = answer(runner, asked)
    assert all(torch.equal(answer(runner, asked), first) for _ in range(99))


def test_without_a_gpu_a_captured_call_is_the_call():
    calls = []
    call = Captured(lambda: calls.append(1) or len(calls), torch.device("cpu"), capture=True)
    assert (call(), call(), calls) == (1, 2, [1, 1])
    call.reset()


def test_the_loop_of_a_schedule_changes_with_the_same_runner():
    """Steps and guidance scale are data: 2 steps at 3, then 4 at 1.5, then 2 at 3 again."""
    first, other = request(), request(num_inference_steps=4, guidance_scale=1.5)
    assert plan_of(first).key == plan_of(other).key
    runner = runner_for(first)
    states = [answer(runner, asked) for asked in (first, other, first)]
    assert torch.equal(states[0], states[2])
    assert torch.equal(states[1], answer(runner_for(other), other))


def test_a_buffer_is_filled_once_for_the_same_data():
    runner, filled = runner_for(request()), []
    for key in ("a", "a", "b", "a"):
        runner.once("name", key, lambda: filled.append(1))
    assert len(filled) == 3


def test_a_buffer_whose_filling_failed_is_filled_again():
    """Half-written data must not pass for the old or the new."""
    runner = runner_for(request())
    runner.once("name", "old", lambda: None)
    with pytest.raises(KeyError):
        runner.once("name", "new", lambda: {}["x"])
    filled = []
    runner.once("name", "old", lambda: filled.append(1))
    assert filled == [1]


def test_a_step_is_prepared_once():
    runner = runner_for(request())
    assert [runner.prepare(guided) for guided in (True, False, True, False)] == [
        True, True, False, False,
    ]  # fmt: skip
    runner.close()
    assert runner.prepare(True)


@pytest.mark.parametrize(
    ("tokens", "steps", "capacity", "rounded"),
    [(1, 1, 256, 64), (256, 64, 256, 64), (257, 65, 1024, 128), (4096, 129, 4096, 192)],
)
def test_lengths_round_up_to_a_capacity(tokens, steps, capacity, rounded):
    plan = plan_of(request())
    key = ShapeKey.of(plan.layout, plan.masks, 2, tokens, steps)
    assert (key.capacity, key.steps, key.branches) == (capacity, rounded, 2)
    assert (key.grid, key.rows, key.noisy_video, key.noisy_rows) == ((2, 3, 3), 4, 9, 4)


def test_a_plan_has_room_for_the_longer_prompt_and_for_all_steps():
    key = plan_of(request(negative=ids(300), num_inference_steps=65)).key
    assert (key.capacity, key.steps) == (1024, 128)


def test_a_prompt_past_the_largest_capacity_is_refused():
    plan = plan_of(request())
    with pytest.raises(ValueError, match="a prompt may hold 4096 tokens, got 4097"):
        ShapeKey.of(plan.layout, plan.masks, 1, CAPACITIES[-1] + 1, 1)


@pytest.mark.parametrize(
    ("cfg_size", "rank", "guided", "branches"),
    [(1, 0, True, (0, 2)), (1, 0, False, (0, 1)), (2, 0, True, (0, 1)), (2, 1, True, (1, 2)),
     (2, 1, False, (0, 1))],
)  # fmt: skip
def test_branches_of_a_rank(cfg_size, rank, guided, branches):
    mesh = Mesh(torch.device("cpu"), cfg_size=cfg_size)
    mesh.cfg_rank = rank
    assert branch_range(guided, mesh) == branches


@pytest.mark.parametrize(
    ("rank", "interval", "branches"),
    [(0, None, (0,)), (1, None, (1,)), (1, (900, 1000), (0, 1)), (0, (900, 1000), (0,))],
)
def test_a_rank_of_two_encodes_the_prompts_it_needs(rank, interval, branches):
    """Outside the interval both groups run the conditional branch."""
    mesh = Mesh(torch.device("cpu"), cfg_size=2)
    mesh.cfg_rank = rank
    asked = request(guidance_interval=interval, num_inference_steps=4)
    assert plan_of(asked).branches(mesh) == branches


def test_the_velocity_of_a_former_mask_does_not_stay():
    """Same counts of noisy tokens, other places: frames 0 and 1 swap roles."""
    first = request(cond_frame_indexes=(0,))
    second = request(cond_frame_indexes=(1,), cond_video_latents=noise(1, 48, 2, 5, 6, seed=9))
    assert plan_of(first).key == plan_of(second).key
    shared = runner_for(first)
    answer(shared, first)
    got = answer(shared, second)
    assert torch.equal(got, answer(runner_for(second), second))
    tokens, values = shared.inputs.video.shape
    velocity = shared.velocity[:, : tokens * values].unflatten(1, (tokens, values))
    assert velocity.any() and not velocity[:, shared.inputs.noisy[:tokens] == 0].any()
