"""The CUDA row kernel, emulated: every plan for a row, under every schedule of the threads, bit for bit; and that the
emulation notices a missing barrier."""

import ctypes
import shutil
from pathlib import Path

import pytest
import torch
from conftest import BACKENDS_HERE, ROOT
from probes import compiled_probe

import grpo_kernels as gk
from grpo_kernels.testing.compare import assert_as_accurate

if "emulated" not in BACKENDS_HERE:
    pytest.skip("needs the source tree, whose CUDA kernels the tests emulate", allow_module_level=True)

import emulated

MACHINE = {"shared_bytes": 10 << 10, "threads": 64}
# Numbers of bf16 logits that between them need every plan on that machine: vectors and scalars, two blocks per
# multiprocessor or one, a tail that is loaded again, clusters of 2 and of 8, the last with a tail too.
VOCABULARIES = (1, 7, 31, 257, 1500, 3000, 5003, 6000, 8001, 21000, 45000)
H100, A100, CONSUMER = 227 << 10, 163 << 10, 99 << 10  # the last: sm_86, sm_89 and, with bulk copies, sm_120
SCALED_CONSUMER = {
    "shared_bytes": 14 << 10,
    "threads": 64,
}  # an eighth of it, except for the two kilobytes in addition to the row


def plan(vocab, size=2, bulk=True, two_pass=True):
    return emulated.row_plan(MACHINE["shared_bytes"], MACHINE["threads"], bulk, vocab * size, two_pass)


def test_the_vocabularies_reach_every_plan():
    plans = [plan(v) for v in VOCABULARIES]
    assert {p.cluster for p in plans} >= {1, 2, 8} and {p.threads for p in plans} == {32, 64}
    assert {(p.cluster > 1, p.resident > 0) for p in plans} == {(a, b) for a in (False, True) for b in (False, True)}
    assert not any(plan(v, bulk=False).cluster > 1 for v in VOCABULARIES)
    assert not any(plan(v, two_pass=False).resident for v in VOCABULARIES)


@pytest.mark.parametrize("vocab", [32000, 50257, 110_000, 128_256, 151_936, 202_048, 262_144, 1_000_000])
@pytest.mark.parametrize("shared_bytes", [H100, A100])
def test_plans_for_data_center_gpus(vocab, shared_bytes):
    for size in (2, 4):
        bulk = shared_bytes == H100
        single, double = (emulated.row_plan(shared_bytes, 512, bulk, vocab * size, t) for t in (False, True))
        assert single[:3] == double[:3]  # or one pass and two would sum in different orders
        tile, blocks = double.threads * 32, 512 // double.threads
        assert blocks * (double.shared_bytes + 1024) <= shared_bytes + 1024  # the system takes a kilobyte per block
        assert 4 <= double.slots <= 32 and double.slots - double.resident >= 2
        row_bytes = vocab * size / double.cluster
        fits = row_bytes <= double.slots * tile
        assert fits == (double.resident == 0) or row_bytes > (double.slots - 1) * tile
        if size == 2 and bulk:
            assert fits == (vocab not in (128_256, 151_936, 1_000_000))
            assert double.cluster == {202_048: 2, 262_144: 4, 1_000_000: 8}.get(vocab, 1)


# Plans for bf16 rows: threads, slots, resident slots, and the blocks of a cluster where there are clusters.
ON_CONSUMER_GPUS = {
    20_000: (256, 5, 0, 1), 32_000: (512, 6, 0, 1), 50_257: (512, 6, 4, 1),
    128_256: (512, 6, 0, 4), 151_936: (512, 6, 0, 4), 262_144: (512, 6, 0, 8),
}  # fmt: skip


@pytest.mark.parametrize("vocab", ON_CONSUMER_GPUS)
@pytest.mark.parametrize("bulk", [True, False])
def test_plans_for_consumer_gpus(vocab, bulk):
    threads, slots, resident, cluster = ON_CONSUMER_GPUS[vocab]
    p = emulated.row_plan(CONSUMER, 512, bulk, 2 * vocab, True)
    assert (p.threads, p.slots, p.cluster) == (threads, slots, cluster if bulk else 1)
    assert p.resident == (4 if cluster > 1 and not bulk else resident)
    assert 512 // threads * (p.shared_bytes + 1024) <= CONSUMER + 1024


@pytest.mark.parametrize("vocab", [20_000, 50_257, 128_256])
@pytest.mark.parametrize("bulk", [True, False])
def test_rows_as_on_a_consumer_gpu(vocab, bulk):
    gpu, vocab = emulated.row_plan(CONSUMER, 512, bulk, 2 * vocab, True), vocab // 8
    here = emulated.row_plan(*SCALED_CONSUMER.values(), bulk, 2 * vocab, True)
    assert (here.slots, here.resident, here.cluster) == (gpu.slots, gpu.resident, gpu.cluster)
    case, results = Case(vocab, torch.bfloat16, shift=1), []
    for schedule in emulated.SCHEDULES:
        with emulated.machine(**SCALED_CONSUMER, bulk_copies=bulk, schedule=schedule):
            results.append(case.two_passes())
    assert same(results[0], results[1]) and same(results[0], results[2])
    eager, exact = case.two_passes("reference"), case.two_passes("reference", wide=True)
    for values in zip(results[0], eager, exact, strict=True):
        assert_as_accurate(*values, what=f"{vocab} columns")


@pytest.mark.parametrize("vocab", [300, 21000])
def test_small_blocks_with_much_memory_keep_to_the_slots_that_have_barriers(vocab):
    """A slot has one bit of a 32-bit word and two barriers: at most 32 slots, although the memory would hold 111."""
    much = {"shared_bytes": H100, "threads": 64}
    p = emulated.row_plan(*much.values(), True, 2 * vocab, True)
    assert p.slots == 32 and p.shared_bytes <= H100
    case = Case(vocab, torch.bfloat16)
    with emulated.machine(**much):
        ours = case.two_passes()
    eager, exact = case.two_passes("reference"), case.two_passes("reference", wide=True)
    for values in zip(ours, eager, exact, strict=True):
        assert_as_accurate(*values, what=f"{vocab} columns")


class Case:
    """Logits [2, 4, V] for three targets per sequence, with a masked row, given derivatives, a peak on one target."""

    def __init__(self, vocab, dtype, seed=0, shift=0):
        g = torch.Generator().manual_seed(seed)
        room = torch.zeros(2 * 4 * vocab + shift)
        room[shift:] = 3 * torch.randn(2 * 4 * vocab, generator=g)
        self.logits = room.to(dtype)[shift:].view(2, 4, vocab)  # shift: not on 16 bytes
        self.targets = torch.randint(vocab, (2, 3), generator=g)
        self.mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
        self.logits[0, 2] = torch.nan  # masked
        self.logits[1, 1, self.targets[1, 1]] = 40.0
        self.g_logps, self.g_entropy = torch.randn(2, 3, generator=g), 0.1 * torch.randn(2, 3, generator=g)
        self.advantages, self.old = torch.randn(2, generator=g), -5 * torch.rand(2, 3, generator=g)

    def two_passes(self, backend="emulated", wide=False, entropy=True, inplace=False, **options):
        x = self.logits.clone().to(torch.float64 if wide else self.logits.dtype).requires_grad_()
        out = gk.token_logps(
            x * 1 if inplace else x, self.targets, mask=self.mask, return_entropy=True, return_sum_p2=True, backend=backend,
            inplace_backward=inplace, **options,
        )  # fmt: skip
        loss = (out.logps * self.g_logps).sum() + ((out.entropy * self.g_entropy).sum() if entropy else 0)
        (gradient,) = torch.autograd.grad(loss, x)
        return out.logps.detach(), out.entropy.detach(), out.sum_p2, gradient

    def loss(self, backend="emulated", single_pass=True, inplace=False, **options):
        x = self.logits.clone().requires_grad_()
        out = gk.grpo_loss(
            x * 1 if inplace else x, self.targets, self.advantages, self.mask, old_logps=self.old, backend=backend,
            single_pass=single_pass, inplace=inplace, **options,
        )  # fmt: skip
        return out.loss.detach(), out.logps, torch.autograd.grad(out.loss, x)[0]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("bulk", [True, False])
def test_accuracy_at_every_vocabulary(dtype, bulk):
    options = {"temperature": torch.tensor([0.7, 1.3])}
    with emulated.machine(**MACHINE, bulk_copies=bulk):
        for vocab in VOCABULARIES if dtype == torch.bfloat16 else VOCABULARIES[::3]:
            for softcap in (None, 5.0) if vocab in (257, 6000) else (None,):
                case = Case(vocab, dtype, shift=1)
                mine = case.two_passes(softcap=softcap, **options)
                eager = case.two_passes("reference", softcap=softcap, **options)
                exact = case.two_passes("reference", wide=True, softcap=softcap, **options)
                for name, *values in zip(("logps", "entropy", "sum_p2", "gradient"), mine, eager, exact, strict=True):
                    assert_as_accurate(*values, what=f"{name} of {vocab}, softcap {softcap}")
                rows, columns = torch.arange(6).view(2, 3), case.targets
                at_target = [g[:, :3].reshape(6, -1)[rows.flatten(), columns.flatten()] for g in (mine[3], exact[3])]
                torch.testing.assert_close(at_target[0].double(), at_target[1], rtol=0.02, atol=1e-5)


@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_neither_schedule_nor_copies_nor_passes_change_a_bit(vocab):
    """A schedule that finds a race gives other bits, or NaNs; late copies give what the slot held before."""
    config = gk.LossConfig(kl_coef=0.0, entropy_coef=0.1)
    case, results = Case(vocab, torch.bfloat16, shift=vocab % 3), []
    for schedule in emulated.SCHEDULES:
        with emulated.machine(**MACHINE, schedule=schedule):
            results.append((*case.two_passes(), *case.loss(config=config)))
    assert all(same(results[0], other) for other in results[1:])
    assert same(case.two_passes(inplace=True), case.two_passes())
    one = case.loss(config=config)
    assert same(case.loss(config=config, inplace=True), one)
    assert same(case.loss(config=config, single_pass=False), one)
    with emulated.machine(**MACHINE, bulk_copies=False, schedule="one_warp_ahead"):
        assert plan(vocab).cluster > 1 or same(case.loss(config=config), one)


@pytest.mark.parametrize("vocab", [31, 5003, 8001])
def test_a_row_depends_on_nothing_but_the_row(vocab):
    """Not on its place in the batch, the number of multiprocessors or the other rows; at one alignment."""
    vocab = vocab // 8 * 8
    case = Case(vocab, torch.bfloat16)
    expected = case.two_passes()
    with emulated.machine(**MACHINE, multiprocessors=5):
        assert same(case.two_passes(), expected)
    case.logits, case.targets, case.mask = case.logits[1:, 1:2], case.targets[1:, 1:2], case.mask[1:, 1:2]
    case.g_logps, case.g_entropy = case.g_logps[1:, 1:2], case.g_entropy[1:, 1:2]
    for alone, row in zip(case.two_passes(), expected, strict=True):
        assert torch.equal(alone, row[1:, 1:2])


@pytest.mark.parametrize("vocab", [31, 5003, 8001])
def test_rows_without_a_distribution_or_a_gradient(vocab):
    case = Case(vocab, torch.float32)
    case.logits[0, 0] = -torch.inf
    case.logits[0, 1, 1:] = -torch.inf
    case.targets[0, 1] = 0
    case.g_logps[1] = case.g_entropy[1] = 0
    case.logits[1, 2, 3] = torch.nan
    logps, entropy, _, gradient = case.two_passes()
    assert logps[0, 0].isnan() and gradient[0, 0].isnan().all()
    assert logps[0, 1] == 0 and entropy[0, 1] == 0 and gradient[0, 1].count_nonzero() == 0
    assert logps[1, 2].isnan() and gradient[1].count_nonzero() == 0  # not even NaN * 0
    assert gradient[0, 2].count_nonzero() == 0 and gradient[:, 3].count_nonzero() == 0


# ---- mutations: what the emulation notices ----

MUTANTS = {  # file, statement that is removed or replaced; OFF is true in all but this mutant, ON in this one alone
    "nothing": ("row_kernel.cuh", ""),
    "the first sync": ("row_kernel.cuh", "sync();\n  }"),
    "the last sync": ("row_kernel.cuh", "sync();  // nobody exits"),
    "the publishing of barriers": ("row_kernel.cuh", "publish_barriers();"),
    "the barrier after the epilogue": ("row_kernel.cuh", "sync_computing();\n    return"),
    "the barrier of the reduction": ("row_kernel.cuh", "sync_computing();\n    if (warp"),
    "the wait for a tile": ("row_kernel.cuh", "wait(&ring.full[slot]"),
    "the wait for a free slot": ("row_kernel.cuh", "wait(&ring.empty[slot]"),
    "a warp's barrier before the release": ("row_kernel.cuh", "__syncwarp();\n    if (lane_of_thread() == 0) arrive("),
    "the release of a slot": ("row_kernel.cuh", "arrive(&ring.empty[slot])"),
    "the wait for the cluster": ("row_kernel.cuh", "wait_cluster(&control->exchanged"),
    "alignment": ("row_kernel.cuh", "load16(", "load16((ON ? 4 : 0) + "),
    "half of each warp at a barrier": (
        "row_kernel.cuh",
        "sync_threads(1, computing)",
        "if (OFF || lane_of_thread() < kWarp / 2) sync_threads(1, ON ? computing / 2 : computing)",
    ),
}


@pytest.fixture(scope="module")
def probe(tmp_path_factory):
    """rows_probe.cpp's function. It contains every mutant, and an argument selects the one that runs."""
    folder = tmp_path_factory.mktemp("mutants")
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    for number, (name, old, *new) in enumerate(MUTANTS.values()):
        source = folder / "csrc/cuda" / name
        text = source.read_text()
        assert old in text, old
        changed = (new[0] if new else f"if (OFF) {old}" if old else "").replace("OFF", f"mutant != {number}")
        source.write_text(text.replace(old, changed.replace("ON", f"mutant == {number}"), 1))
    shutil.copy(Path(__file__).parent / "rows_probe.cpp", folder)
    return compiled_probe(folder / "rows_probe.cpp", folder / "csrc", folder).probe


@pytest.mark.parametrize("number, mutant", list(enumerate(MUTANTS)))
def test_a_missing_barrier_is_noticed(number, mutant, probe):
    outcomes = set()
    for vocab in (5003, 8001):
        logits = torch.randn(5, vocab, generator=torch.Generator().manual_seed(0))
        exact = logits[:, 3] - logits.logsumexp(1)
        gradients = []
        for schedule in range(len(emulated.SCHEDULES)):
            gradient, logps = torch.zeros_like(logits), torch.zeros(5)
            addresses = map(ctypes.c_void_p, (logits.data_ptr(), gradient.data_ptr(), logps.data_ptr()))
            if probe(*addresses, 5, vocab, schedule, number):
                outcomes.add("error")
            elif not torch.allclose(logps, exact, atol=1e-4):
                outcomes.add("wrong")
            gradients.append(gradient)
        outcomes.add("same" if all(same(gradients[:1], [g]) for g in gradients) else "races")
    assert (outcomes == {"same"}) == (mutant == "nothing"), outcomes
