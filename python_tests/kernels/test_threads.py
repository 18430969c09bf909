"""Threads of the CPU kernels: exceptions, memory that runs out, forks, signals, several callers. What may hang runs in
a process of its own with a time limit."""

import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import BACKENDS_HERE, ROOT, environment

import grpo_kernels as gk

if "cpu" not in BACKENDS_HERE:
    pytest.skip("needs the CPU kernels", allow_module_level=True)

PROBES = Path(__file__).parent


def build(program: str, sanitizers: str, optimisation: str, folder: Path) -> Path:
    """threads_probe.cpp or sizes_probe.cpp with csrc/cpu, which need neither torch nor Python."""
    built = folder / program
    flags = f"-std=c++17 -w -g1 {optimisation} -fsanitize={sanitizers} -fno-sanitize-recover=undefined -DGK_ISA=generic"
    sources = [PROBES / f"{program}.cpp", *sorted((ROOT / "csrc/cpu").glob("*.cpp"))]
    command = ["c++", *flags.split(), "-I", ROOT / "csrc", "-rdynamic", *sources, "-o", built, "-ldl", "-pthread"]
    subprocess.run(command, check=True)
    return built


def runs_well(program: Path, *arguments: str) -> None:
    # An allocation that fails is an answer to the program, not an error of it.
    options = {f"{s}SAN_OPTIONS": "allocator_may_return_null=1" for s in ("A", "T")}
    command = [program, *arguments]
    done = subprocess.run(command, env=environment(**options), capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0 and done.stdout.endswith("well\n"), done.stdout + done.stderr


@pytest.fixture
def compiler() -> None:
    if shutil.which("c++") is None or not (ROOT / "csrc").exists():
        pytest.skip("needs the source tree and a C++ compiler")


@pytest.mark.soak_where(lambda optimisation, **_: optimisation == "-O1")
@pytest.mark.parametrize(("optimisation", "tries"), [("-O0", "2"), ("-O1", "60")])
def test_no_data_races(optimisation, tries, tmp_path, compiler):
    """ThreadSanitizer watches loops, every kernel and the end of memory. std::threads run them, by the code for forked
    children and through an OpenMP entry point of the program's own: GNU's runtime synchronises out of its sight."""
    runs_well(build("threads_probe", "thread", optimisation, tmp_path), tries)


@pytest.mark.soak
def test_no_memory_error_when_memory_runs_out(tmp_path, compiler):
    runs_well(build("threads_probe", "address,undefined", "-O1", tmp_path), "60")


@pytest.mark.soak_where(lambda optimisation: optimisation == "-O1")
@pytest.mark.parametrize("optimisation", ["-O0", "-O1"])
def test_shapes_and_strides_at_the_limits(optimisation, tmp_path, compiler):
    """No rows, a vocabulary of one, strides of 2^31 and negative ones, 2^31 logits, more than any memory has."""
    runs_well(build("sizes_probe", "address,undefined", optimisation, tmp_path))


@pytest.mark.parametrize("shape", [(2**40, 2**19), (2**19, 2**40), (2**31, 2**28)])
def test_shapes_beyond_any_memory_are_refused(shape):
    """Strides of 0 make such tensors cost nothing; their outputs are the first that cannot be had."""
    batch, tokens = shape
    x, ids, one = torch.zeros(1, 1).expand(shape), torch.zeros(1, 1, dtype=torch.int64), torch.ones(1)
    for call in (
        lambda: gk.token_logps(torch.zeros(1, 1, 8).expand(*shape, 8), ids.expand(shape)),
        lambda: gk.grpo_loss(torch.zeros(1, 1, 8).expand(*shape, 8), ids.expand(shape), one.expand(batch)),
        lambda: gk.policy_loss(x, one.expand(batch)),
        lambda: gk.gae(x, x, gamma=1.0, lam=1.0),
        lambda: gk.whiten(x),
        lambda: gk.group_advantages(one.expand(batch * tokens), group_size=2),
        lambda: gk.group_diversity(ids.expand(2**40, 9), group_size=2),
    ):
        with pytest.raises(
            (RuntimeError, ValueError), match=r"can't allocate memory|multiplication overflow|must have at most"
        ):
            call()


PREPARE = """
import os, resource, signal, sys, threading, time
import torch

signal.alarm(100)
torch.set_num_threads(2)
torch.manual_seed(0)
logits, targets = torch.randn(4, 65, 5003), torch.randint(0, 5003, (4, 65))
few, ids = torch.randn(1, 1, 90001), torch.randint(9, (64, 40))


def results(threads=2):  # of the kernels on so many threads; torch's own ops run on one, as they would hang in a child
    import grpo_kernels as gk

    torch.set_num_threads(1)
    torch.get_num_threads = lambda: threads
    x = logits.detach().requires_grad_()
    loss = gk.grpo_loss(x, targets, torch.arange(4.0)).loss
    loss.backward()
    out = [loss.detach(), x.grad, *gk.token_logps(few, targets[:1, :1]), *gk.group_diversity(ids, group_size=32)]
    return [t for t in out if t is not None]


def same(a, b):
    return len(a) == len(b) and all(map(torch.equal, a, b))


def forked(run):  # the child's exit code
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 9
    try:
        signal.alarm(50)
        code = 0 if run() else 1
    finally:
        os._exit(code)


def address_space(more=None):  # a limit above what is mapped now; None: no limit
    mapped = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    soft = resource.RLIM_INFINITY if more is None else mapped + more
    resource.setrlimit(resource.RLIMIT_AS, (soft, resource.RLIM_INFINITY))

"""


def script(code: str, *arguments: str) -> None:
    command = [sys.executable, "-c", PREPARE + code, *arguments]
    env = environment(MALLOC_MMAP_THRESHOLD_="65536")  # or the allocator would keep what a limit is to take away
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


OPENMP_BEFORE_FORK = """
child = lambda: same(results(2), results(1))
torch.ones(10_000_000).exp()  # torch's OpenMP threads are there
assert forked(child) == 0, "a child that imports the package"
import grpo_kernels
assert forked(child) == 0, "a child that loads the kernels"
expected = results(1)
both = lambda: child() and same(results(2), expected)
assert same(results(2), expected)
assert forked(both) == 0, "a child that has the kernels"
assert forked(lambda: both() and forked(both) == 0 and both()) == 0, "a child's child"
assert both()
"""

NOTHING_BEFORE_FORK = """
child = lambda: same(results(2), results(1))
assert forked(child) == 0, "a child that imports the package"
import grpo_kernels
assert forked(child) == 0, "a child that loads the kernels"
expected = results(1)
both = lambda: child() and same(results(2), expected)
assert forked(both) == 0, "a child that has the kernels"
assert both()
import multiprocessing
with multiprocessing.get_context("fork").Pool(2) as pool:
    assert all(same(r, expected) for r in pool.map(results, [1, 2, 3]))
"""


@pytest.mark.parametrize("code", [OPENMP_BEFORE_FORK, NOTHING_BEFORE_FORK], ids=["with threads", "without threads"])
def test_a_forked_child_does_not_wait_for_threads_it_has_not_got(code):
    """torch's own parallel loops do, where its OpenMP threads were there before the fork."""
    script(code)


FEWER_THREADS = """
expected = results(1)

def child():
    address_space(mib << 20)
    try:
        found = results(threads)
    except (MemoryError, RuntimeError) as error:  # the kernel's, or that of torch, which is a RuntimeError
        if isinstance(error, RuntimeError) and "allocate memory" not in str(error):
            raise
        found = expected
    address_space()
    return same(found, expected) and same(results(threads), expected)

for threads in map(int, sys.argv[1].split()):
    for mib in map(int, sys.argv[2].split()):
        assert forked(child) == 0, (threads, mib)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space")
@pytest.mark.soak_where(lambda threads, **_: len(threads) > 3)
@pytest.mark.parametrize(
    ("threads", "mib"), [("3 8", "12 20 30"), ("2 3 5 16 64", " ".join(map(str, range(1, 120, 6))))]
)
def test_threads_that_cannot_start_leave_the_work_to_those_that_have(threads, mib):
    """A thread's stack takes 8 MiB of addresses."""
    script(FEWER_THREADS, threads, mib)


OUT_OF_MEMORY = """
import grpo_kernels as gk
rewards = torch.randn(200_000)
run = lambda: gk.group_advantages(rewards, group_size=100_000)
torch.set_num_threads(1)
expected = run()
torch.set_num_threads(2)
run(), torch.ones(1_000_000).exp()  # threads and what they keep
said = []
for kib in range(0, 8 << 10, int(sys.argv[1])):
    address_space(kib << 10)
    try:
        run()
    except (MemoryError, RuntimeError) as error:
        said.append(type(error))
    address_space()
    assert torch.ones(1_000_000).exp().isfinite().all()
    assert same(run(), expected), kib
assert MemoryError in said, said  # in the kernel; torch's own is a RuntimeError
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space")
@pytest.mark.soak_where(lambda step: step == "64")
@pytest.mark.parametrize("step", ["400", "64"])
def test_memory_that_runs_out_on_several_threads_is_an_exception(step):
    script(OUT_OF_MEMORY, step)


INTERRUPTED = """
import grpo_kernels as gk
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job starts with it ignored
z, t, a = torch.randn(256, 70001), torch.randint(0, 70001, (256,)), torch.randn(256)
torch.set_num_threads(1)
x = z.clone().requires_grad_()
gk.grpo_loss(x, t, a).loss.backward()
expected = x.grad
torch.set_num_threads(2)
torch.ones(10_000_000).exp()
threads_before = len(os.listdir("/proc/self/task"))
for _ in range(int(sys.argv[1])):
    leaf = z.clone().requires_grad_()
    y = leaf * 1  # is overwritten with its gradient
    seen, running, ticks, most = y.detach(), True, 0, 0

    def watch():
        global ticks, most
        while seen[0, 0] == z[0, 0]:
            time.sleep(0)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)  # the first row is done
        while running:
            ticks, most = ticks + 1, max(most, len(os.listdir("/proc/self/task")))
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        gk.grpo_loss(y, t, a, inplace=True)
        for _ in range(2000):  # a signal that another thread takes ends no sleep
            time.sleep(0.01)
        raise AssertionError("no KeyboardInterrupt")
    except KeyboardInterrupt:
        running = False
    watcher.join()
    assert torch.equal(seen, expected), "the call did not finish"
    assert ticks >= 5, "no other Python thread ran during the call"
    assert most == threads_before + 1, "threads besides torch's and the watcher"
    x.grad = None
    gk.grpo_loss(x, t, a).loss.backward()
    assert torch.equal(x.grad, expected)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
@pytest.mark.soak_where(lambda times: times > 1)
@pytest.mark.parametrize("times", [1, 10])
def test_an_interrupt_waits_for_the_call_and_spoils_nothing(times):
    """The GIL is released, so others go on; the kernels run on torch's own threads and no others."""
    script(INTERRUPTED, str(times))


@pytest.mark.soak_where(lambda calls: calls > 60)
@pytest.mark.parametrize("calls", [60, 3000])
def test_calls_from_several_python_threads(calls):
    """Each kernel with inputs of its own in each thread: the bits of one thread, whatever runs beside it."""
    torch.manual_seed(0)
    logits, targets = torch.randn(4, 64, 5003), torch.randint(5003, (64,))
    few, ids = torch.randn(4, 1, 90001), torch.randint(9, (4, 64, 40))
    rewards, values = torch.randn(2, 4, 70_000)

    def call(i: int) -> list[torch.Tensor]:
        k = i % 4
        x = logits[k].clone().requires_grad_()
        loss = gk.grpo_loss(x, targets, torch.linspace(-1, 1, 64)).loss
        loss.backward()
        advantages = gk.group_advantages(rewards[k], group_size=7).advantages
        found = [
            loss.detach(),
            x.grad,
            advantages,
            gk.gae(rewards[k : k + 1], values[k : k + 1], gamma=0.9, lam=0.8).advantages,
        ]
        return [*found, gk.token_logps(few[k], targets[:1]).logps, gk.group_diversity(ids[k], group_size=32).keep]

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    expected = [call(i) for i in range(4)]
    torch.set_num_threads(2)
    try:
        with ThreadPoolExecutor(4) as pool:
            for i, found in enumerate(pool.map(call, range(calls))):
                assert all(map(torch.equal, found, expected[i % 4])), i
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_linear_loss_repeats_its_bits_and_those_of_torch_matmul(threads):
    """What the README promises from hidden states: with as many threads, equal bits; and around the matmuls of the same
    chunks, those of the row kernel. torch's matmul has others with other threads, rows or processors."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(3, 33, 48), torch.randn(5003, 48)
    targets, advantages = torch.randint(0, 5003, (3, 33)), torch.randn(3)

    def linear() -> list[torch.Tensor]:
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = gk.linear_grpo_loss(h, w, targets, advantages, chunk_rows=33).loss
        loss.backward()
        return [loss.detach(), h.grad, w.grad, gk.linear_token_logps(h, w, targets, chunk_rows=33).logps.detach()]

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        first = linear()
        assert all(all(map(torch.equal, linear(), first)) for _ in range(5))
        logits = torch.stack([torch.mm(h, weight.t()) for h in hidden])
        assert torch.equal(first[3], gk.token_logps(logits, targets).logps)
        loss = gk.grpo_loss(logits.requires_grad_(), targets, advantages).loss
        loss.backward()
        assert torch.equal(first[0], loss) and torch.equal(first[1], logits.grad @ weight)
    finally:
        torch.set_num_threads(before)
