import functools
import gc
import weakref
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tuner.data import Batch, Split
from tuner.errors import ObjectiveError
from tuner.training import Options, Run, RunningLoss, fit
from tuner.training.batches import Resident
from tuner.training.graphs import CapturedStep
from tuner.training.steps import Step, fastest

CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)
pytestmark = [pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature")]

# What makes a host wait for a device: reading a number or a shape that only the device knows.
SYNCS = {"_local_scalar_dense", "item", "nonzero", "is_nonzero", "masked_select", "equal", "_unique2", "unique_dim"}


class CountSyncs(TorchDispatchMode):
    """Counts operations that would make the host wait, were the tensors on a device."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in SYNCS:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def some_rows(n=64, *, images=False):
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(n, 3, 8, 8, generator=generator) if images else torch.randn(n, 4, generator=generator)
    return Split(x, (x.flatten(1)[:, 0] > 0.5).long())


def a_model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 2))


def train(model, rows=None, *, optimizer=None, lines=None, epochs=2, batch_size=16, **changes):
    options = {
        name: changes.pop(name) for name in ("precision", "compile", "cuda_graphs", "channels_last") if name in changes
    }
    return fit(
        model,
        some_rows() if rows is None else rows,
        **{
            "optimizer": optimizer or fastest(torch.optim.SGD, model.parameters(), lr=0.1),
            "loss": nn.CrossEntropyLoss(),
            "metrics": {},
            "epochs": epochs,
            "batch_size": batch_size,
            "seed": 1,
            "run": Run(options=Options(**options), log=(lines if lines is not None else []).append),
            **changes,
        },
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_an_epoch_waits_for_the_device_as_often_for_many_batches_as_for_few(kind, precision):
    def syncs(batch_size):
        model = a_model()
        optimizer = fastest(kind, model.parameters(), lr=0.01)
        with CountSyncs() as counted:
            train(model, optimizer=optimizer, batch_size=batch_size, precision=precision, epochs=1, max_grad_norm=1.0)
        return counted.names

    few, many = syncs(32), syncs(4)
    assert few == many
    assert len(many) <= 2


def test_the_count_of_syncs_would_see_one():
    with CountSyncs() as counted:
        train(a_model(), loss=lambda outputs, _: outputs.sum() * (outputs.sum().item() * 0), epochs=1, batch_size=4)
    assert len(counted.names) >= 16


@pytest.mark.cuda
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_no_step_waits_for_a_cuda_device(precision):
    model = a_model().to(CUDA)
    optimizer = fastest(torch.optim.AdamW, model.parameters(), lr=0.01)
    step = Step(model, nn.CrossEntropyLoss(), optimizer, CUDA, precision=precision, max_grad_norm=1.0)
    batches = Resident(some_rows(1024).to(CUDA), 16)
    losses = RunningLoss(CUDA)
    order = torch.randperm(1024, device=CUDA)
    step(next(batches.shuffled(order)))  # libraries may wait when they are first used
    try:
        torch.cuda.set_sync_debug_mode("error")
        for batch in batches.shuffled(order):
            losses.add(step(batch), len(batch.targets))
            losses.is_broken()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert losses.mean() > 0


@pytest.mark.cuda
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_a_captured_step_trains_as_one_that_is_launched_by_itself(kind):
    rows = some_rows(70).to(CUDA)

    def trained(*, cuda_graphs):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)).to(CUDA)
        optimizer = fastest(kind, model.parameters(), lr=0.05)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)
        lines = []
        history = train(
            model, rows, optimizer=optimizer, scheduler=scheduler, cuda_graphs=cuda_graphs, epochs=4, lines=lines
        )
        assert lines == []
        return model.state_dict(), history

    (one, history), (other, its_history) = trained(cuda_graphs=False), trained(cuda_graphs=True)
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, msg=name)
    losses = [epoch.train_loss for epoch in history]
    assert [epoch.train_loss for epoch in its_history] == pytest.approx(losses, rel=1e-4)


def waits(outputs, targets):
    return nn.functional.cross_entropy(outputs, targets) * max(1.0, outputs.sum().item() * 0)


@pytest.mark.cuda
def test_a_step_that_waits_for_the_device_is_launched_by_itself_and_told_with_its_line():
    model, lines = a_model().to(CUDA), []
    history = train(model, some_rows().to(CUDA), cuda_graphs=True, batch_size=8, lines=lines, loss=waits)
    assert len(history) == 2
    line = waits.__code__.co_firstlineno + 1
    assert lines == [
        f"--cuda-graphs: each step is launched by itself, as it waits for the device in {__file__}, line {line}"
    ]


@pytest.mark.cuda
def test_a_capture_that_fails_leaves_a_process_that_goes_on(monkeypatch):
    monkeypatch.setattr("tuner.training.graphs._syncs", lambda: nullcontext([]))  # that it waits is not noticed before
    model, lines = a_model().to(CUDA), []
    history = train(model, some_rows().to(CUDA), cuda_graphs=True, batch_size=8, lines=lines, loss=waits)
    assert len(history) == 2
    assert [line.partition(",")[0] for line in lines] == ["--cuda-graphs: each step is launched by itself"]
    # Dropout draws from the generator; memory that runs out is given back; and the next capture succeeds.
    lines.clear()
    assert len(train(a_model().to(CUDA), some_rows().to(CUDA), cuda_graphs=True, batch_size=8, lines=lines)) == 2
    assert lines == []
    del model
    torch.cuda.empty_cache()
    kept = torch.empty(1 << 20, device=CUDA)
    free = torch.cuda.mem_get_info(CUDA)[0]
    first = torch.empty(int(free * 0.6), dtype=torch.uint8, device=CUDA)
    del first
    second = torch.empty(int(free * 0.7), dtype=torch.uint8, device=CUDA)  # fits only if the first is given back
    assert (len(kept), len(second)) == (1 << 20, int(free * 0.7))


@pytest.mark.cuda
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("tensor", [False, True])
def test_a_captured_step_follows_its_schedule_without_being_captured_again(monkeypatch, kind, tensor):
    captures = []
    capture = CapturedStep.capture
    monkeypatch.setattr(CapturedStep, "capture", lambda *args: captures.append(1) or capture(*args))
    model = a_model().to(CUDA)
    before = []
    optimizer = fastest(kind, model.parameters(), lr=torch.tensor(0.05) if tensor else 0.05)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1.0 if epoch < 2 else 0.0)

    def on_epoch(epoch):
        before.append(torch.cat([param.detach().flatten() for param in model.parameters()]))

    train(
        model,
        some_rows(64).to(CUDA),
        optimizer=optimizer,
        scheduler=scheduler,
        cuda_graphs=True,
        epochs=4,
        on_epoch=on_epoch,
    )
    assert len(captures) == 1
    assert not torch.equal(before[0], before[1])
    assert torch.equal(before[1], before[3])  # at a rate of 0 nothing moves
    assert float(optimizer.param_groups[0]["lr"]) == 0.0


@pytest.mark.cuda
def test_a_trial_leaves_nothing_on_the_device():
    rows = some_rows(256).to(CUDA)

    def memory_after(cuda_graphs):
        train(a_model().to(CUDA), rows, cuda_graphs=cuda_graphs)
        torch.cuda.empty_cache()
        return torch.cuda.memory_allocated(CUDA)

    for cuda_graphs in (False, True):
        memory_after(cuda_graphs)  # the workspaces of libraries stay
        assert memory_after(cuda_graphs) == memory_after(cuda_graphs)


@pytest.mark.cuda
@pytest.mark.parametrize("precision", ["tf32", "bf16", "fp16"])
def test_less_precise_training_ends_near_the_precise_one(precision):
    def trained(**options):
        return train(a_model().to(CUDA), some_rows(2048).to(CUDA), epochs=10, **options)[-1].train_loss

    assert trained(precision=precision) == pytest.approx(trained(), abs=0.02)


def test_without_a_cuda_device_there_are_no_graphs_and_training_is_the_same():
    one, other, lines = nn.Linear(4, 2), nn.Linear(4, 2), []
    other.load_state_dict(one.state_dict())
    assert train(one, cuda_graphs=True, lines=lines) == train(other)
    assert lines == ["--cuda-graphs: each step is launched by itself, as this device is cpu and not CUDA"]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_model_computes_in_half_precision_and_keeps_its_weights_in_full(precision):
    model, seen = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 2)), set()
    model[2].register_forward_hook(lambda _, __, outputs: seen.add(outputs.dtype))
    history = train(model, epochs=8, precision=precision)
    assert seen == {torch.bfloat16 if precision == "bf16" else torch.float16}
    assert {param.dtype for param in model.parameters()} == {torch.float32}
    assert history[-1].train_loss < history[0].train_loss


def test_matrix_products_are_rounded_to_tf32_only_where_asked_for():
    seen = []
    for precision in ("fp32", "tf32", "fp32"):
        train(
            a_model(),
            precision=precision,
            epochs=1,
            loss=lambda outputs, targets: (
                seen.append(torch.get_float32_matmul_precision()) or nn.functional.cross_entropy(outputs, targets)
            ),
        )
    assert seen == 4 * ["highest"] + 4 * ["high"] + 4 * ["highest"]


@pytest.mark.parametrize("compiled", [False, True])
def test_a_model_is_freed_as_soon_as_it_is_trained(monkeypatch, compiled):
    # Left to the garbage collector, which knows nothing of a device's memory, models of many trials would lie there.
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **_: compile_(function, backend="eager"))
    model = a_model()
    optimizer = fastest(torch.optim.AdamW, model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2)
    left = weakref.ref(model[0].weight)
    gc.collect()
    gc.disable()
    try:
        train(model, optimizer=optimizer, scheduler=scheduler, compile=compiled)
        del model, optimizer, scheduler
        torch.compiler.reset()
        assert left() is None
    finally:
        gc.enable()


def test_lbfgs_takes_the_steps_that_it_takes_by_hand():
    rows = some_rows()
    ours, plain = (nn.Linear(4, 2) for _ in range(2))
    plain.load_state_dict(ours.state_dict())
    kind = functools.partial(torch.optim.LBFGS, lr=0.5, max_iter=5, line_search_fn="strong_wolfe")
    history = train(ours, rows, optimizer=kind(ours.parameters()), epochs=3, batch_size=64)
    optimizer, losses = kind(plain.parameters()), []

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(plain(inputs), targets)
        loss.backward()
        return loss

    order = torch.Generator().manual_seed(1)
    for _ in range(3):
        inputs, targets = rows.rows(torch.randperm(64, generator=order)).batch
        losses.append(optimizer.step(closure).item())
    assert [epoch.train_loss for epoch in history] == pytest.approx(losses)
    assert all(torch.equal(ours.state_dict()[name], value) for name, value in plain.state_dict().items())


class Sharpness(torch.optim.SGD):
    """Steps by the gradient at the worst place nearby, for which it asks (Foret and others 2021)."""

    def step(self, closure=None):
        assert closure is not None, "this optimizer requires a closure"
        params = [param for group in self.param_groups for param in group["params"]]
        norm = torch.stack([param.grad.norm() for param in params]).norm() + 1e-12
        moves = [0.05 * param.grad / norm for param in params]
        with torch.no_grad():
            torch._foreach_add_(params, moves)
        closure()
        with torch.no_grad():
            torch._foreach_sub_(params, moves)
        super().step()


def test_an_optimizer_that_only_says_at_its_first_step_that_it_needs_a_closure_gets_one():
    model = nn.Linear(4, 2)
    history = train(model, optimizer=Sharpness(model.parameters(), lr=0.5), epochs=20)
    assert history[-1].train_loss < 0.7 * history[0].train_loss


class FailsOnce(torch.optim.SGD):
    """Fails at its first step, of nothing that a closure would mend."""

    failed = False

    def step(self, closure=None):
        if not self.failed:
            self.failed = True
            raise RuntimeError("the device was lost")
        return super().step(closure)


def test_what_an_optimizer_raises_of_anything_but_a_closure_ends_the_training():
    model = nn.Linear(4, 2)
    with pytest.raises(RuntimeError, match="the device was lost"):
        train(model, optimizer=FailsOnce(model.parameters(), lr=0.5))


def test_what_a_loss_raises_ends_the_training_though_it_would_not_again():
    failures = iter([RuntimeError("the device was lost")])

    def loss(outputs, targets):
        for error in failures:
            raise error
        return nn.functional.cross_entropy(outputs, targets)

    with pytest.raises(RuntimeError, match="the device was lost"):
        train(nn.Linear(4, 2), loss=loss)


@pytest.mark.parametrize(
    ("loss", "told"),
    [
        (lambda outputs, targets: 0.5, "a tensor that is one number, got float: take the mean"),
        (lambda outputs, targets: outputs.mean(1), r"a tensor that is one number, got a tensor of shape \[16\]"),
        (lambda outputs, targets: outputs.mean().detach(), "got one without a gradient"),
    ],
)
def test_a_loss_that_cannot_be_followed_is_refused(loss, told):
    with pytest.raises(ObjectiveError, match=told):
        train(nn.Linear(4, 2), loss=loss)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"precision": "fp16"}, "--precision fp16 cannot scale gradients here, as LBFGS computes the loss several"),
        ({"max_grad_norm": 1.0}, "max_grad_norm cannot clip gradients here, as LBFGS computes the loss several times"),
    ],
)
def test_what_a_closure_cannot_be_combined_with_is_refused(changes, told):
    model = nn.Linear(4, 2)
    with pytest.raises(ObjectiveError, match=told):
        train(model, optimizer=torch.optim.LBFGS(model.parameters()), **changes)


def test_lazy_layers_have_their_shapes_before_anything_is_done_with_them():
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(2))
    train(model, some_rows(images=True), optimizer=torch.optim.SGD(model.parameters(), lr=0.1), channels_last=True)
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_gradients_are_clipped_to_the_norm():
    def change(**clipping):
        model = nn.Linear(4, 2)
        nn.init.zeros_(model.weight)
        before = [param.detach().clone() for param in model.parameters()]
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        train(model, optimizer=optimizer, epochs=1, batch_size=64, **clipping)
        pairs = zip(model.parameters(), before, strict=True)
        return float(torch.cat([(param - old).detach().flatten() for param, old in pairs]).norm())

    assert change() > 0.2
    assert change(max_grad_norm=0.01) == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize(
    ("kind", "fused"), [(torch.optim.SGD, True), (torch.optim.AdamW, True), (torch.optim.Rprop, None)]
)
def test_an_optimizer_is_fused_where_there_is_one(kind, fused):
    optimizer = fastest(kind, nn.Linear(2, 2).parameters(), lr=0.25)
    assert (type(optimizer), optimizer.param_groups[0].get("fused")) == (kind, fused)
    assert optimizer.param_groups[0]["lr"] == 0.25


def test_a_wrong_setting_of_an_optimizer_is_not_hidden():
    with pytest.raises(TypeError, match="momentun"):
        fastest(torch.optim.SGD, nn.Linear(2, 2).parameters(), momentun=0.9)


def test_images_are_channels_last_in_a_model_that_wants_them_so():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 2))
    seen = set()
    model[0].register_forward_pre_hook(
        lambda _, inputs: seen.add(inputs[0].is_contiguous(memory_format=torch.channels_last))
    )
    train(model, some_rows(images=True), channels_last=True)
    assert seen == {True}
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_a_loss_with_weights_is_moved_to_the_model_and_used():
    model = nn.Linear(4, 2)
    step = Step(model, nn.CrossEntropyLoss(torch.tensor([1.0, 0.0])), torch.optim.SGD(model.parameters()), CPU)
    rows = some_rows(16)
    outputs = model(rows.inputs).detach()
    wanted = nn.functional.cross_entropy(outputs[rows.targets == 0], rows.targets[rows.targets == 0])
    assert float(step(rows.batch)) == pytest.approx(float(wanted))


def a_batch(n):
    return Batch(torch.zeros(n, 4), torch.zeros(n))


def test_a_graph_is_of_full_batches_though_training_was_resumed_at_a_smaller_one(monkeypatch):
    taken = []
    monkeypatch.setattr("tuner.training.graphs.side_stream", lambda device: None)
    monkeypatch.setattr("tuner.training.graphs._on", lambda stream: nullcontext())
    monkeypatch.setattr("tuner.training.graphs._syncs", lambda: nullcontext([]))
    captured = CapturedStep(torch.optim.SGD(nn.Linear(4, 2).parameters()), CUDA)
    for n in (5, 32, 32, 5, 32):
        assert not captured.is_due(a_batch(n))
        captured.warm_up(a_batch(n), lambda batch: taken.append(len(batch.targets)) or batch.targets.sum())
    assert captured.is_due(a_batch(32))
    assert not captured.is_due(a_batch(5))
    assert taken == [5, 32, 32, 5, 32]


@pytest.mark.parametrize(
    ("kind", "captured"), [(torch.optim.SGD, True), (torch.optim.AdamW, True), (torch.optim.Adagrad, False)]
)
def test_an_optimizer_that_counts_its_steps_on_the_host_is_not_captured(kind, captured):
    model, lines = nn.Linear(4, 2), []
    optimizer = kind(model.parameters(), lr=0.1)
    Step(model, nn.CrossEntropyLoss(), optimizer, torch.device("cuda", 0), cuda_graphs=True, log=lines.append)
    why = "as Adagrad cannot keep its count of steps on the device; SGD and AdamW can"
    assert lines == ([] if captured else [f"--cuda-graphs: each step is launched by itself, {why}"])
