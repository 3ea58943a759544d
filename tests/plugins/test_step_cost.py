"""What a step costs, against sums done by hand; fake tensors and real ones are counted alike."""

import copy

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F

from featherlight.plugins.step_cost import StepMeter, count_samples

FLOAT = 4


def cost_of(model, x, optimizers=(), step=False):
    with StepMeter(model, optimizers, x) as meter:
        loss = model(x).sum()
        meter.forward_is_done()
        loss.backward()
        if step:
            for optimizer in optimizers:
                optimizer.step()
    return meter.cost


def mlp():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, qkv):
        q, k, v = (qkv * self.scale).unbind(0)
        return F.scaled_dot_product_attention(q, k, v)


class Product(nn.Module):
    def __init__(self, size=1000):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x):
        return self.weight * x


# -- FLOPs ------------------------------------------------------------------------------------------------------------
def test_linear_layers():
    cost = cost_of(mlp(), torch.ones(5, 4))
    first, second = 2 * 5 * 4 * 8, 2 * 5 * 8 * 3
    assert cost.flops_forward == first + second
    assert cost.flops_backward == first + 2 * second  # weights of both, the input of the second


@pytest.mark.parametrize(("stride", "padding", "size"), [(1, 1, 6), (1, 0, 4), (2, 1, 3)])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_convolutions(stride, padding, size, groups):
    conv = nn.Conv2d(4, 8, 3, stride, padding, groups=groups)
    cost = cost_of(conv, torch.ones(2, 4, 6, 6))
    flops = 2 * (2 * size * size * 8) * (4 // groups * 9)  # a multiply-add is 2: outputs times what each sums over
    assert cost.flops_forward == flops
    assert cost.flops_backward == flops


def test_transposed_and_grouped_convolutions_of_inputs_that_train():
    for conv, outputs in ((nn.ConvTranspose2d(4, 8, 2, 2, bias=False), 2 * 6 * 6 * 4), (nn.Conv2d(4, 8, 2, groups=2), 2 * 5 * 5 * 8)):
        cost = cost_of(conv, torch.ones(2, 4, 6, 6, requires_grad=True))
        each = conv.weight[0].numel()  # multiply-adds of one input (transposed) or one output
        assert (cost.flops_forward, cost.flops_backward) == (2 * outputs * each, 2 * 2 * outputs * each)


def test_attention():
    """(batch, heads, length, width) = (2, 3, 5, 4): scores and values are a product of 2·B·h·L²·d each."""
    cost = cost_of(Attention(), torch.ones(3, 2, 3, 5, 4))
    product = 2 * 2 * 3 * 5 * 5 * 4
    assert cost.flops_forward == 2 * product
    assert cost.flops_backward in (4 * product, 5 * product)  # a fused kernel computes the scores once more


def test_a_transformer_block_is_12_d_squared_a_token_and_4_l_squared_d(make_vit):
    """qkv 3·d², projection d², MLP 8·d² multiply-adds a token (arXiv 2010.11929), d = 16, 5 tokens, 4 images."""
    blocks = [cost_of(make_vit(depth), torch.ones(4, 1, 8, 8)).flops_forward for depth in (1, 2)]
    assert blocks[1] - blocks[0] == 4 * (2 * 12 * 16**2 * 5 + 4 * 5**2 * 16)


def test_frozen_layers_have_a_forward_and_no_backward():
    model = mlp()
    model[0].requires_grad_(False)
    cost = cost_of(model, torch.ones(5, 4))
    assert cost.flops_forward == 2 * 5 * 4 * 8 + 2 * 5 * 8 * 3
    assert cost.flops_backward == 2 * 5 * 8 * 3


def test_without_a_mark_all_is_forward():
    model = mlp()
    with StepMeter(model) as meter:
        model(torch.ones(5, 4)).sum().backward()
    assert meter.cost.flops_forward == 3 * 2 * 5 * 8 * 3 + 2 * 2 * 5 * 4 * 8
    assert meter.cost.flops_backward == 0


# -- bytes saved for backward -----------------------------------------------------------------------------------------
def test_saved_bytes_of_an_mlp():
    """The images (5·4) for the first weight's gradient; the activations (5·8) for the ReLU and the second weight, once."""
    assert cost_of(mlp(), torch.ones(5, 4)).saved_bytes == FLOAT * (5 * 4 + 5 * 8)


def test_saved_bytes_of_a_deeper_mlp_are_a_sum_over_layers():
    model = nn.Sequential(*(layer for _ in range(3) for layer in (nn.Linear(6, 6), nn.Sigmoid())), nn.Linear(6, 1))
    assert cost_of(model, torch.ones(7, 6)).saved_bytes == FLOAT * 7 * 6 * (1 + 3)  # a sigmoid keeps its output, as the next layer does


def test_parameters_and_buffers_are_not_counted_as_saved():
    model = nn.BatchNorm1d(3)
    cost = cost_of(model, torch.ones(8, 3))
    assert cost.saved_bytes == FLOAT * (8 * 3 + 2 * 3)  # the input, and this batch's mean and standard deviation


def test_a_view_counts_its_whole_storage_once():
    model, whole = nn.Linear(4, 2, bias=False), torch.ones(10, 4)
    with StepMeter(model) as meter:
        loss = model(whole[:3]).sum() + model(whole[3:5]).sum()
        meter.forward_is_done()
        loss.backward()
    assert meter.cost.saved_bytes == FLOAT * 10 * 4


def test_nothing_is_saved_where_nothing_trains():
    model = mlp().requires_grad_(False)
    with StepMeter(model) as meter:
        model(torch.ones(5, 4))
        meter.forward_is_done()
    assert (meter.cost.saved_bytes, meter.cost.flops_backward) == (0, 0)


# -- peak -------------------------------------------------------------------------------------------------------------
def test_peak_of_one_product():
    """weight, input, product, sum: 12,004 bytes forward. The product is gone then; sum, its gradient, the weight's: 12,008."""
    assert cost_of(Product(), torch.ones(1000)).peak_bytes == 3 * FLOAT * 1000 + 2 * FLOAT


def test_gradients_and_optimizer_state_from_before_count():
    model = Product()
    optimizer = torch.optim.AdamW(model.parameters())
    x = torch.ones(1000)
    cost_of(model, x, [optimizer], step=True)
    optimizer.zero_grad()
    # two moments and a step count that were there before
    assert cost_of(model, x, [optimizer]).peak_bytes == 5 * FLOAT * 1000 + 3 * FLOAT
    # the gradient is there too now: it is added to in place, but the new one is whole before it is added
    assert cost_of(model, x, [optimizer]).peak_bytes == 6 * FLOAT * 1000 + 3 * FLOAT


def test_the_peak_holds_what_is_saved(make_small_resnet, images):
    model = make_small_resnet()
    cost = cost_of(model, images["resnet"])
    weights = sum(value.nbytes for value in model.state_dict().values())
    assert cost.peak_bytes > weights + cost.saved_bytes - images["resnet"].nbytes


# -- the same numbers whatever runs it --------------------------------------------------------------------------------
def conv_net():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    )


@pytest.mark.parametrize("kind", ["mlp", "conv", "vit"])
def test_fake_tensors_cost_what_real_ones_do(kind, make_vit):
    build, shape = {"mlp": (mlp, (5, 4)), "conv": (conv_net, (4, 3, 8, 8)), "vit": (make_vit, (4, 1, 8, 8))}[kind]

    def steps(model, x):
        optimizer = torch.optim.AdamW(model.parameters())
        return [cost_of(model, x, [optimizer], step=True) for _ in range(2)]

    real = steps(build(), torch.ones(shape))
    with torch.device("meta"):  # timm reads values of helper tensors when it builds a model
        model = build()
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = steps(model.to_empty(device="cpu"), torch.ones(shape))
    assert fake == real
    assert real[1].peak_bytes > real[0].peak_bytes  # moments are there before the second step


@pytest.mark.filterwarnings("ignore:Using `torch.compile")  # the FLOP counter's hooks see the wrapper too; they count nothing
def test_a_compiled_model_costs_what_it_does_eagerly():
    torch._dynamo.reset()
    model, x = mlp(), torch.ones(5, 4)
    compiled = torch.compile(model, backend="eager")
    compiled(x).sum().backward()
    model.zero_grad()
    assert cost_of(compiled, x) == cost_of(mlp(), x)


def test_counting_changes_no_number():
    model, x = mlp(), torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    other = copy.deepcopy(model)
    cost_of(model, x)
    other(x).sum().backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), other.parameters()))


def test_an_error_in_the_step_leaves_nothing_on():
    model = mlp()

    def broken_step():
        with StepMeter(model):
            raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        broken_step()
    assert torch.utils._python_dispatch._len_torch_dispatch_stack() == 0
    assert cost_of(model, torch.ones(5, 4)).flops_forward == 560


# -- samples ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("batch", "samples"),
    [
        (torch.ones(3, 2), 3),
        (([torch.ones(4, 2), torch.ones(4, 2)], torch.ones(4)), 4),
        ({"length": 7, "t": torch.tensor(1.0), "x": torch.ones(2, 9)}, 2),
        (torch.ones(0, 2), 0),
        (torch.tensor(1.0), 1),
        (["a text", "another"], 1),
        (None, 1),
    ],
)
def test_samples_are_counted_in_whatever_a_loader_gives(batch, samples):
    assert count_samples(batch) == samples
