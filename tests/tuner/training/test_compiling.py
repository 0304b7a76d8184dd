import functools
import os
import signal
import subprocess
import sys
import threading

import pytest
import torch
from command import wait_for
from processes import forks
from torch import nn

from tuner.data import Split
from tuner.training import Interrupted, Options, Run, compile_aside, fit
from tuner.training.checked_step import _Kept
from tuner.training.compiling import MODEL, STEP, Gain
from tuner.training.whole_step import _FOLLOWED, WholeStep, why_not_whole

FOLLOWS = hasattr(torch._dynamo.config, "trace_autograd_ops")
"""Whether the computation of gradients is compiled, too."""
whole = pytest.mark.skipif(not FOLLOWS, reason="torch's compiler follows gradients from 2.11 on")
ROWS = 70
"""Not a multiple of the batch size: each epoch has a smaller last batch."""


def some_rows():
    x = torch.randn(ROWS, 4, generator=torch.Generator().manual_seed(0))
    return Split(x, (x[:, 0] > 0).long())


def a_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 2))


class Trained:
    """A training of four epochs with a falling rate, and what was told of it."""

    def __init__(
        self, compiled, *, kind=None, model=None, options=None, on_epoch=None, epochs=4, may_fork=False, **changes
    ):
        self.model = a_model() if model is None else model
        kind = kind or functools.partial(torch.optim.SGD, momentum=0.9, weight_decay=1e-3)
        self.optimizer = kind(self.model.parameters(), lr=0.1)
        self.lines, self.gains = [], []
        options = Options(**{"compile": compiled, "compile_backend": "aot_eager", **(options or {})})
        self.history = fit(
            self.model,
            some_rows(),
            optimizer=self.optimizer,
            scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, epochs),
            metrics={},
            epochs=epochs,
            batch_size=16,
            seed=1,
            on_epoch=on_epoch and functools.partial(on_epoch, self),
            run=Run(options=options, may_fork=may_fork, log=self.lines.append, on_compiled=self.gains.append),
            **{"loss": nn.CrossEntropyLoss(), **changes},
        )

    @property
    def losses(self):
        return [epoch.train_loss for epoch in self.history]

    def check_same(self, other, **tolerance):
        assert self.losses == pytest.approx(other.losses, **tolerance)
        for name, value in other.model.state_dict().items():
            torch.testing.assert_close(self.model.state_dict()[name], value, rtol=1e-4, atol=1e-5, msg=name)


@pytest.fixture
def graphs():
    """Counts what is compiled in the test, which leaves nothing of it."""
    torch.compiler.reset()
    counted = torch._dynamo.utils.counters["stats"]
    before = counted["unique_graphs"]
    yield lambda: counted["unique_graphs"] - before
    torch.compiler.reset()


@pytest.fixture
def uncompiled(monkeypatch):
    """Has what is to be compiled run as it is: for what is around it."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


@whole
@pytest.mark.slow
def test_a_whole_step_is_compiled_once_after_an_epoch_and_trains_as_it_is(graphs):
    seen = []
    compiled = Trained(True, max_grad_norm=0.5, on_epoch=lambda _, epoch: seen.append((epoch.number, graphs())))
    assert seen == [(1, 0), (2, 1), (3, 1), (4, 1)]  # neither for another rate nor for the last batch
    compiled.check_same(Trained(False, max_grad_norm=0.5), rel=1e-5)
    (gain,) = compiled.gains
    assert gain.what == STEP
    assert gain.n_steps == 3 * 5 - 1
    assert min(gain.compile_s, gain.before_s, gain.after_s) > 0
    assert compiled.lines == [str(gain)]


@pytest.mark.slow
def test_where_the_update_cannot_be_followed_model_and_loss_are_compiled(graphs):
    compiled = Trained(True, kind=torch.optim.Rprop)
    assert graphs() == 1
    compiled.check_same(Trained(False, kind=torch.optim.Rprop))
    first, last = compiled.lines
    assert first == "--compile: model and loss alone, as torch's compiler cannot follow the update of Rprop"
    assert last == str(compiled.gains[0])
    assert compiled.gains[0].what == MODEL


@pytest.mark.parametrize(
    "kind", [None, pytest.param(functools.partial(torch.optim.LBFGS, max_iter=2), marks=pytest.mark.slow)]
)
def test_what_cannot_be_compiled_trains_as_it_is_and_says_why_in_one_line(monkeypatch, kind):
    compile_ = torch.compile

    def broken(graph, inputs):
        raise NotImplementedError("no such backend")

    monkeypatch.setattr(torch, "compile", lambda function, **_: compile_(function, backend=broken))
    compiled = Trained(True, kind=kind)
    compiled.check_same(Trained(False, kind=kind), rel=0, abs=0)
    (line,) = compiled.lines
    assert line.startswith("--compile: not compiled, BackendCompilerFailed: ")
    assert compiled.gains == []


@pytest.mark.parametrize("wrong", [lambda loss: loss * 1.5, lambda loss: loss + (loss - loss.detach()) * 3])
def test_code_that_computes_something_else_is_not_used(monkeypatch, wrong):
    monkeypatch.setattr(torch, "compile", lambda function, **_: lambda *given: wrong(function(*given)))
    kind = torch.optim.Rprop  # of a whole step the loss would be changed alone, after all else
    compiled = Trained(True, kind=kind)
    compiled.check_same(Trained(False, kind=kind), rel=0, abs=0)
    (line,) = compiled.lines
    assert line.startswith("--compile: not compiled, NotTheSameError: a compiled step ")


@whole
def test_a_whole_step_that_forgets_a_number_is_not_used(monkeypatch):
    calls = []

    def forgetful(function, **_):
        def compiled(*given):
            calls.append(function.__name__)
            return function(*given)

        if function.__name__ == "step":
            function.__closure__[function.__code__.co_freevars.index("one")].cell_contents.fill_(-40)
        return compiled

    monkeypatch.setattr(torch, "compile", forgetful)
    compiled = Trained(True)
    compiled.check_same(Trained(False))
    assert calls[:2] == ["step", "_mean_loss"]
    assert compiled.lines[0].startswith("--compile: model and loss alone, as NotTheSameError: a compiled step changes")


@whole
@pytest.mark.usefixtures("uncompiled")
def test_a_number_that_changes_while_it_trains_ends_the_compiled_steps():
    def change(trained, epoch):
        if epoch.number == 3:
            trained.optimizer.param_groups[0]["momentum"] = 0.5

    compiled = Trained(True, on_epoch=change)
    compiled.check_same(Trained(False, on_epoch=change))
    why = "momentum of the optimizer changes, from 0.9 to 0.5"
    assert compiled.lines[0] == f"--compile: uncompiled from here on, as {why}"


@pytest.mark.usefixtures("uncompiled")
def test_a_training_that_ends_in_its_first_epoch_compiles_nothing_and_one_that_is_stopped_tells_its_gain():
    assert Trained(True, epochs=1).lines == []
    lines = []

    def stop(trained, epoch):
        lines.append(trained.lines)
        if epoch.number == 3:
            raise Interrupted

    with pytest.raises(Interrupted):
        Trained(True, on_epoch=stop)
    assert lines[-1][-1].startswith("--compile: a step took ")


class Late(torch.optim.SGD):
    """Says at its first step only that it needs a closure."""

    def step(self, closure=None):
        assert closure is not None, "this optimizer requires a closure"
        closure()
        super().step()


@pytest.mark.slow
@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("kind", [torch.optim.LBFGS, Late])
def test_an_optimizer_with_a_closure_trains_as_it_does(kind):
    compiled = Trained(True, kind=kind)
    compiled.check_same(Trained(False, kind=kind), rel=0, abs=0)
    assert compiled.gains == []
    assert compiled.lines == ([] if kind is not Late else ["--compile: not compiled, as Late needs a closure"])


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("calls", [[], ["before the step"]], ids=["before the step", "after it"])
def test_without_memory_for_what_compiling_keeps_training_goes_on(monkeypatch, calls):
    kept = _Kept.__init__

    def full(self, parts):
        kept(self, parts)
        if parts.optimizer.param_groups[0]["params"][0].grad is not None or not calls:
            calls.append("after it")
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(_Kept, "__init__", full)
    compiled = Trained(True)
    compiled.check_same(Trained(False), rel=0, abs=0)
    assert compiled.lines == ["--compile: not compiled, OutOfMemoryError: CUDA out of memory"]


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_is_compiled_too(precision):
    options = {"precision": precision}
    compiled = Trained(True, options=options, max_grad_norm=1.0)
    compiled.check_same(Trained(False, options=options, max_grad_norm=1.0), rel=1e-3)
    (gain,) = compiled.gains
    assert gain.what == (STEP if precision == "bf16" and FOLLOWS else MODEL)


@whole
@pytest.mark.slow
def test_each_followed_optimizer_updates_as_by_itself_in_all_its_groups():
    def taken(kind, *, compiled):
        model = a_model()[::3]  # without dropout
        groups = [{"params": model[0].parameters(), "lr": 0.02}, {"params": model[1].parameters()}]
        optimizer = kind(groups, lr=0.05, weight_decay=0.1)
        inputs, targets = some_rows().batch

        def loss(inputs, targets):
            return nn.functional.cross_entropy(model(inputs), targets)

        def step():
            loss(inputs, targets).backward()
            optimizer.step()
            optimizer.zero_grad()

        step()
        if compiled:
            whole = WholeStep(loss, optimizer, list(model.parameters()), None, torch.device("cpu"))
            function = torch.compile(whole.function, fullgraph=True, backend="eager")
        with torch._dynamo.config.patch(trace_autograd_ops=True):
            for _ in range(3):
                for group in optimizer.param_groups:
                    group["lr"] *= 0.5
                if compiled:
                    whole.put_rates()
                    function(inputs, targets)
                else:
                    step()
        return torch.cat([param.detach().flatten() for param in model.parameters()])

    for kind in _FOLLOWED:
        torch.compiler.reset()
        found, wanted = taken(kind, compiled=True), taken(kind, compiled=False)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5, msg=kind.__name__)


def test_an_optimizer_with_hooks_is_not_followed():
    optimizer = torch.optim.SGD(a_model().parameters(), lr=0.1)
    assert why_not_whole(optimizer) is None
    optimizer.register_step_post_hook(lambda *_: None)
    assert why_not_whole(optimizer) == "the optimizer has hooks"


def test_a_gain_is_told_with_what_it_cost():
    gain = Gain(what=STEP, compile_s=4.0, before_s=0.002, after_s=0.001, n_steps=5000)
    assert str(gain) == (
        "--compile: a step took 2 ms, and 1 ms with the whole step compiled, x 2.00, for 5000 steps; compiling took"
        " 4.0 s, 1.0 s saved in all"
    )
    recorded = {"compiled": STEP, "compile_s": 4.0, "step_ms_uncompiled": 2.0, "step_ms_compiled": 1.0}
    assert gain.attrs() == recorded


@pytest.mark.slow
def test_inductors_code_trains_as_what_it_was_made_of(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    options = {"compile_backend": "inductor"}
    compiled = Trained(True, options=options, kind=torch.optim.AdamW)
    assert [gain.what for gain in compiled.gains] == [STEP if FOLLOWS else MODEL]
    compiled.check_same(Trained(False, kind=torch.optim.AdamW), rel=1e-4)


@pytest.fixture
def directory(tmp_path, monkeypatch):
    """Where it is kept what was compiled."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    return tmp_path


class Beside:
    """Trains with a process beside it that compiles, or has others do it; notes what went on after each epoch."""

    def __init__(self, monkeypatch, compile_, *, ends_in=None, stops_it=None, **changes):
        self.seen, here, number_of = [], os.getpid(), [0]

        def compile_here(function, **_):
            if os.getpid() != here:
                compile_()
            else:
                number_of[0] += 1
            return function

        def on_epoch(_, epoch):
            self.seen.append((epoch.number, len(forks()), number_of[0]))
            if epoch.number == ends_in:
                if stops_it is not None:
                    os.kill(*forks(), stops_it)
                wait_for(lambda: not forks(), "the end of the process that compiles")

        monkeypatch.setattr(torch, "compile", compile_here)
        changes = {"options": {"compile_backend": "inductor"}, "may_fork": True, "epochs": 5, **changes}
        self.trained = Trained(True, on_epoch=on_epoch, **changes)
        assert forks() == []


def stuck():
    threading.Event().wait()


@pytest.mark.usefixtures("directory")
def test_a_process_compiles_while_the_training_goes_on_which_does_itself_at_the_epoch_after(monkeypatch):
    beside = Beside(monkeypatch, lambda: None, ends_in=3)
    assert [(number, compiled) for number, _, compiled in beside.seen] == [(1, 0), (2, 0), (3, 0), (4, 1), (5, 1)]
    beside.trained.check_same(Trained(False, epochs=5), rel=1e-5)
    (gain,) = beside.trained.gains
    assert gain.n_steps == 2 * 5 - (1 if FOLLOWS else 2)
    assert gain.slowed_s is not None
    assert beside.trained.lines[-1] == str(gain)
    assert f" and slowed the steps before by {gain.slowed_s:.1f} s, " in str(gain)


@pytest.mark.usefixtures("directory")
def test_where_the_process_that_compiles_is_killed_the_training_goes_on_uncompiled(monkeypatch):
    beside = Beside(monkeypatch, stuck, ends_in=2, stops_it=signal.SIGKILL)
    assert beside.seen == [(1, 0, 0), (2, 1, 0), (3, 0, 0), (4, 0, 0), (5, 0, 0)]
    beside.trained.check_same(Trained(False, epochs=5), rel=0, abs=0)
    assert beside.trained.lines == ["--compile: not compiled, as the process that compiled ended by SIGKILL"]


@pytest.mark.usefixtures("directory")
def test_a_training_that_ends_first_ends_the_process_that_compiles(monkeypatch):
    beside = Beside(monkeypatch, stuck)
    assert [running for _, running, _ in beside.seen] == [0, 1, 1, 1, 1]
    beside.trained.check_same(Trained(False, epochs=5), rel=0, abs=0)
    assert beside.trained.lines == ["--compile: not compiled, as the training ended before the compiler did"]


@pytest.mark.slow
@pytest.mark.usefixtures("directory")
def test_a_later_training_of_the_same_shapes_and_settings_compiles_after_its_first_epoch(monkeypatch):
    for model, epochs in ((None, [0, 0, 0, 1, 1]), (None, [0, 1, 1, 1, 1]), (a_model()[:2], [0, 0, 0, 1, 1])):
        beside = Beside(monkeypatch, lambda: None, ends_in=3, model=model)
        assert [compiled for _, _, compiled in beside.seen] == epochs


@pytest.mark.usefixtures("directory")
@pytest.mark.parametrize(
    "changes",
    [
        {"may_fork": False},
        {"options": {"compile_backend": "inductor", "deterministic": True}},
        {"options": {"compile_backend": "aot_eager"}},
    ],
)
def test_a_training_that_may_not_depend_on_who_is_faster_or_not_fork_waits_for_the_compiler(monkeypatch, changes):
    beside = Beside(monkeypatch, stuck, **changes)
    assert beside.seen == [(1, 0, 0), (2, 0, 1), (3, 0, 1), (4, 0, 1), (5, 0, 1)]


def test_without_a_place_for_a_lock_the_training_waits_for_the_compiler(directory, monkeypatch):
    (directory / "tuner-locks").write_text("in the way")
    beside = Beside(monkeypatch, stuck)
    assert [compiled for _, _, compiled in beside.seen] == [0, 1, 1, 1, 1]


class Within(torch.autograd.Function):
    """Computes gradients while gradients are computed, so many times."""

    @staticmethod
    def forward(ctx, x, times):
        ctx.times = times
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        if ctx.times:
            with torch.enable_grad():
                Within.apply(torch.ones(1, requires_grad=True), ctx.times - 1).backward()
        return gradient, None


def train_beside_threads_of_autograd():
    Within.apply(torch.ones(1, requires_grad=True), 100).backward()
    with pytest.MonkeyPatch.context() as monkeypatch:
        beside = Beside(monkeypatch, stuck, ends_in=2)
    assert [compiled for _, _, compiled in beside.seen] == [0, 0, 1, 1, 1]
    assert beside.trained.lines == [str(gain) for gain in beside.trained.gains]


@pytest.mark.slow
@pytest.mark.usefixtures("directory")
def test_where_autograd_runs_threads_which_no_fork_goes_on_with_the_training_waits_for_the_compiler():
    code = f"import runpy; runpy.run_path({__file__!r})[{train_beside_threads_of_autograd.__name__!r}]()"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.slow
@pytest.mark.usefixtures("directory")
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Rprop], ids=["step", "model"])
def test_what_the_process_compiled_is_found_on_the_disk(graphs, kind, monkeypatch):
    monkeypatch.setattr(compile_aside, "NICE", 0)  # on a busy machine it would take many minutes
    counted = torch._dynamo.utils.counters
    names = [("aot_autograd", "autograd_cache_hit"), ("aot_autograd", "autograd_cache_miss")]
    names.append(("inductor", "fxgraph_cache_miss"))
    before = [counted[where][name] for where, name in names]

    def on_epoch(_, epoch):
        if epoch.number == 2:
            assert len(forks()) == 1
            wait_for(lambda: not forks(), "the end of the process that compiles", 900)

    compiled = Trained(True, kind=kind, options={"compile_backend": "inductor"}, may_fork=True, on_epoch=on_epoch)
    assert compiled.gains, compiled.lines
    (gain,) = compiled.gains
    assert gain.what == (STEP if kind is torch.optim.AdamW and FOLLOWS else MODEL)
    assert graphs() == 1
    assert [counted[where][name] - n for (where, name), n in zip(names, before, strict=True)] == [1, 0, 0]
    compiled.check_same(Trained(False, kind=kind), rel=1e-4)
