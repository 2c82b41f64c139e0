"""Switches compared bit for bit with torch's max_pool2d with indices and max_unpool2d."""

import pytest
import torch
import torch.nn.functional as F

from segdeconv.models import DeconvNet, SegNet, SegNetBasic
from segdeconv.switches import torch_kernels as implementation
from segdeconv.switches.ops import max_pool, unpool
from segdeconv.switches.packing import pack, unpack

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
SIZES = ((1, 1), (1, 6), (7, 1), (2, 2), (4, 6), (5, 7), (6, 5), (9, 8))
LAYOUTS = (torch.contiguous_format, torch.channels_last)
IMPLEMENTATIONS = ("eager", "plain")
INF = float("inf")


def bits(x):
    """Return the bit patterns as integers on the CPU: 0.0 and -0.0 differ, and a NaN equals itself."""
    return x.detach().cpu().contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def assert_same_bits(ours, theirs):
    assert ours.dtype == theirs.dtype
    assert ours.shape == theirs.shape
    assert torch.equal(bits(ours), bits(theirs))


# The reference is always torch's op for the CPU: an independent device, where ours runs on a GPU, and the op whose ties
# are specified. torch's channels-last kernel for CUDA (2.11) gives index 0 of the whole map for a window of -inf only,
# which is a cell outside the window; its other kernels, and ours, give the window's first cell.


def torch_pool(x):
    """Return the maxima and int64 indices of torch's pooling, on the CPU."""
    return F.max_pool2d(x.cpu(), 2, 2, ceil_mode=True, return_indices=True)


def torch_unpool(x, indices, size):
    """Return torch's unpooling, on the CPU."""
    return F.max_unpool2d(x.cpu(), indices, 2, 2, output_size=size)


def places(switches, size):
    """Return the flat index of each winner in its plane, window by window."""
    rows = 2 * torch.arange(switches.shape[-2])[:, None] + (switches // 2).long().cpu()
    columns = 2 * torch.arange(switches.shape[-1]) + (switches % 2).long().cpu()
    return rows * size[1] + columns


def gradient_like(x):
    """Return a random gradient without negative zeros (see test_negative_zero_gradient_...)."""
    gradient = torch.randn(x.shape, dtype=torch.float64).to(x.dtype).to(x.device)
    return gradient.where(gradient != 0, 1.0)


def random_input(kind, size, dtype, layout=torch.contiguous_format):
    shape = (2, 3, *size)
    if kind == "no ties":
        x = torch.randn(shape, dtype=torch.float64)
    elif kind == "ties":
        x = torch.randint(-1, 2, shape).double()
        x = torch.where((x == 0) & (torch.rand(shape) < 0.5), -0.0, x)
    elif kind == "equal":
        x = torch.full(shape, -3.0)
    else:
        x = torch.where(torch.rand(shape) < 0.8, -INF, torch.randn(shape))
    return x.to(dtype).contiguous(memory_format=layout)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["no ties", "ties", "equal", "minus infinity"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_pool_and_unpool_equal_torch_in_values_positions_and_gradients(dtype, layout, kind, device):
    for size in SIZES:
        x = random_input(kind, size, dtype, layout).to(device)
        ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()

        pooling = max_pool(ours)
        features, indices = torch_pool(theirs)
        assert pooling.size == size
        assert pooling.switches.dtype == torch.uint8
        assert_same_bits(pooling.features, features)
        assert torch.equal(places(pooling.switches, size), indices)

        gradient = gradient_like(features)
        pooling.features.backward(gradient.to(device))
        features.backward(gradient)
        assert_same_bits(ours.grad, theirs.grad)

        ours = features.detach().to(device, copy=True).requires_grad_()
        theirs = features.detach().clone().requires_grad_()
        restored, expected = unpool(ours, pooling.switches, size), torch_unpool(theirs, indices, size)
        assert_same_bits(restored, expected)

        gradient = gradient_like(expected)
        restored.backward(gradient.to(device))
        expected.backward(gradient)
        assert_same_bits(ours.grad, theirs.grad)


def test_negative_zero_gradient_equals_torch():
    x = torch.arange(4.0).reshape(1, 1, 2, 2)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    gradient = torch.tensor([[[[-0.0]]]])
    max_pool(ours).features.backward(gradient)
    torch_pool(theirs)[0].backward(gradient)
    assert_same_bits(ours.grad, theirs.grad)


def test_gradient_of_unpool_preserves_negative_zero_as_torch_does():
    x = torch.arange(4.0).reshape(1, 1, 2, 2)
    features, indices = torch_pool(x)
    ours, theirs = features.clone().requires_grad_(), features.clone().requires_grad_()
    gradient = torch.full_like(x, -0.0)
    unpool(ours, max_pool(x).switches, (2, 2)).backward(gradient)
    torch_unpool(theirs, indices, (2, 2)).backward(gradient)
    assert_same_bits(ours.grad, theirs.grad)


def test_unpool_moves_every_value_unchanged_including_special_values():
    x = torch.tensor([[[[-0.0, float("nan"), INF, -INF, 1e-45]]]])
    switches = torch.tensor([[[[3, 0, 1, 2, 1]]]], dtype=torch.uint8)
    restored = unpool(x, switches, (2, 10))
    expected = torch.zeros(1, 1, 2, 10)
    for window, (dy, dx) in enumerate([(1, 1), (0, 0), (0, 1), (1, 0), (0, 1)]):
        expected[0, 0, dy, 2 * window + dx] = x[0, 0, 0, window]
    assert_same_bits(restored, expected)


@pytest.mark.parametrize("implementation_name", IMPLEMENTATIONS)
@pytest.mark.parametrize("cell", range(4))
def test_window_with_a_nan_gives_nan(cell, implementation_name):
    pool = getattr(implementation, f"pool_{implementation_name}")
    x = torch.randn(1, 1, 5, 5)
    x[0, 0, 2 + cell // 2, 2 + cell % 2] = float("nan")
    features, switches = pool(x)
    assert features.isnan().nonzero().tolist() == [[0, 0, 1, 1]]
    assert switches.max() <= 3


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_eager_and_plain_agree_in_every_bit(dtype, layout):
    for size in SIZES:
        for kind in ("no ties", "ties", "equal", "minus infinity"):
            x = random_input(kind, size, dtype, layout)
            features, switches = implementation.pool_eager(x)
            plain_features, plain_switches = implementation.pool_plain(x)
            assert_same_bits(plain_features, features)
            assert torch.equal(plain_switches, switches)
            assert plain_switches.dtype == switches.dtype == torch.uint8
            assert_same_bits(
                implementation.place_plain(features, switches, *size),
                implementation.place_eager(features, switches, *size),
            )
            values = random_input("ties", size, dtype, layout)
            assert_same_bits(implementation.pick_plain(values, switches), implementation.pick_eager(values, switches))


@pytest.mark.parametrize("implementation_name", IMPLEMENTATIONS)
@pytest.mark.parametrize("size", SIZES)
def test_picking_reads_the_cell_that_placing_wrote(size, implementation_name):
    place = getattr(implementation, f"place_{implementation_name}")
    pick = getattr(implementation, f"pick_{implementation_name}")
    x = torch.randn(2, 3, *size)
    features, indices = torch_pool(x)
    switches = max_pool(x).switches
    assert_same_bits(place(features, switches, *size), torch_unpool(features, indices, size))
    assert_same_bits(pick(x, switches), x.flatten(2).gather(2, indices.flatten(2)).view_as(features))


def test_unpool_places_caffes_example():
    # caffe-segnet test_upsample_layer.cpp: values 1, 2, 9, 4 with mask 2, 5, 12, 14 into 4x4.
    # Its mask crosses windows (1 moves from top left to top right), so here each value is in the window of its cell.
    flat = {2: 1.0, 5: 2.0, 12: 9.0, 14: 4.0}
    values, switches = torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2, dtype=torch.uint8)
    for place, value in flat.items():
        row, column = divmod(place, 4)
        values[0, 0, row // 2, column // 2] = value
        switches[0, 0, row // 2, column // 2] = 2 * (row % 2) + column % 2
    expected = torch.tensor([[[[0.0, 0, 1, 0], [0, 2, 0, 0], [0, 0, 0, 0], [9, 0, 4, 0]]]])
    assert torch.equal(unpool(values, switches, (4, 4)), expected)
    caffe = torch.tensor([[[[1.0, 2], [9, 4]]]]), torch.tensor([[[[2, 5], [12, 14]]]])
    assert torch.equal(torch_unpool(*caffe, (4, 4)), expected)


def test_first_cell_wins_a_tie():
    assert max_pool(torch.zeros(1, 2, 5, 7)).switches.eq(0).all()
    assert max_pool(torch.tensor([[[[0.0, 1.0], [1.0, 1.0]]]])).switches.item() == 1
    assert max_pool(torch.tensor([[[[-0.0, 0.0], [0.0, -0.0]]]])).switches.item() == 0


def test_sizes_of_the_originals_chain_and_back():
    x = torch.randn(1, 2, 360, 480)
    chain = []
    for expected in [(180, 240), (90, 120), (45, 60), (23, 30), (12, 15)]:
        chain.append(max_pool(x))
        x = chain[-1].features
        assert tuple(x.shape[-2:]) == tuple(chain[-1].switches.shape[-2:]) == expected
        assert chain[-1].switches.dtype == torch.uint8
        assert chain[-1].switches.element_size() == 1
    for pooling in reversed(chain):
        x = unpool(x, pooling.switches, pooling.size)
    assert tuple(x.shape[-2:]) == (360, 480)


def test_strided_and_expanded_inputs_and_gradients_are_read_correctly():
    base = torch.randn(2, 3, 12, 14)
    x = base[:, :, ::2, 1::2].requires_grad_()
    assert_same_bits(max_pool(x).features, torch_pool(x.contiguous())[0])
    pooling = max_pool(x)
    restored = unpool(pooling.features, pooling.switches, pooling.size)
    (gradient,) = torch.autograd.grad(restored.sum(), x)  # the gradient of a sum is an expanded scalar
    assert torch.equal(gradient, (restored != 0).float())


def test_channels_last_stays_channels_last():
    x = torch.randn(2, 3, 5, 7).to(memory_format=torch.channels_last)
    pooling = max_pool(x)
    restored = unpool(pooling.features, pooling.switches, pooling.size)
    assert pooling.features.is_contiguous(memory_format=torch.channels_last)
    assert restored.is_contiguous(memory_format=torch.channels_last)


def test_deterministic_algorithms_allow_forward_and_backward():
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        x = torch.randn(1, 2, 5, 7, requires_grad=True)
        features, indices = torch_pool(x.detach())
        with pytest.raises(RuntimeError, match="deterministic"):
            torch_unpool(features, indices, (5, 7))  # the operation that this project replaces
        pooling = max_pool(x)
        unpool(pooling.features, pooling.switches, pooling.size).square().sum().backward()
    finally:
        torch.use_deterministic_algorithms(before)
    assert torch.equal(x.grad != 0, torch_unpool(features, indices, (5, 7)) != 0)


@pytest.mark.parametrize("size", [(4, 4), (5, 3), (1, 2)])
def test_first_and_second_derivatives_are_correct(size):
    # The values are distinct and far apart, so that no finite difference moves a maximum.
    x = torch.randperm(2 * size[0] * size[1]).double().reshape(1, 2, *size).requires_grad_()
    switches = max_pool(x).switches
    values = torch.randn(switches.shape, dtype=torch.float64, requires_grad=True)

    def pooled(x):
        return max_pool(x).features.pow(3)

    def restored(values):
        return unpool(values, switches, size).pow(3)

    for function, argument in ((pooled, x), (restored, values)):
        assert torch.autograd.gradcheck(function, argument)
        assert torch.autograd.gradgradcheck(function, argument)


def test_switches_have_no_gradient_and_the_input_is_not_saved():
    x = torch.randn(1, 2, 4, 4, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor.dtype) or tensor, lambda t: t):
        pooling = max_pool(x)
        unpool(pooling.features, pooling.switches, pooling.size)
    assert not pooling.switches.requires_grad
    assert set(saved) == {torch.uint8}


@pytest.mark.parametrize(
    ("values", "switches", "size", "message"),
    [
        ((1, 2, 3, 4), (torch.int64, (1, 2, 3, 4)), (6, 8), r"torch\.int64 switches .* switches must be uint8"),
        ((1, 2, 3, 4), (torch.uint8, (1, 3, 3, 4)), (6, 8), r"shape \(1, 3, 3, 4\): .* have the shape of the values"),
        ((1, 2, 3, 4), (torch.uint8, (1, 2, 3, 4)), (7, 8), r"to size \(7, 8\) .* pool size to \(4, 4\)"),
        ((1, 2, 3, 4), (torch.uint8, (1, 2, 3, 4)), (6, 9), r"to size \(6, 9\) .* pool size to \(3, 5\)"),
    ],
)
def test_wrong_arguments_are_refused(values, switches, size, message):
    dtype, shape = switches
    with pytest.raises(ValueError, match=message):
        unpool(torch.zeros(values), torch.zeros(shape, dtype=dtype), size)


def test_compiled_equals_eager_in_values_and_gradients():
    def function(x):
        pooling = max_pool(x)
        return unpool(pooling.features * 2, pooling.switches, pooling.size), pooling.switches

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for size in [(5, 7), (8, 6)]:
        ours = torch.randint(-2, 3, (2, 3, *size)).float().requires_grad_()
        theirs = ours.detach().clone().requires_grad_()
        restored, switches = compiled(ours)
        expected, expected_switches = function(theirs)
        assert_same_bits(restored, expected)
        assert torch.equal(switches, expected_switches)
        gradient = gradient_like(expected)
        restored.backward(gradient)
        expected.backward(gradient)
        assert torch.equal(ours.grad, theirs.grad)


@pytest.mark.slow
def test_exported_network_takes_any_size_and_has_no_indices_or_scatter():
    model = SegNet(3, width=0.125).eval()
    height, width = torch.export.Dim("height", min=33, max=4096), torch.export.Dim("width", min=33, max=4096)
    program = torch.export.export(model, (torch.randn(1, 3, 64, 96),), dynamic_shapes=({2: height, 3: width},))

    nodes = [*program.graph.nodes, *program.run_decompositions().graph.nodes]
    operators = {str(node.target) for node in nodes if node.op == "call_function"}
    assert any("conv" in operator for operator in operators)
    forbidden = ("max_pool", "max_unpool", "scatter", "index_put")
    assert not [operator for operator in operators if any(word in operator for word in forbidden)]

    exported = program.module()
    for size in [(33, 47), (70, 40)]:
        image = torch.randn(1, 3, *size)
        with torch.no_grad():
            expected = model(image)
            torch.testing.assert_close(exported(image), expected)
        assert expected.std() > 0.01  # so that the tolerance means something


# Packed switches.


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [1, 2, 4, 7, 8])
def test_packed_switches_take_a_byte_for_four_channels_and_can_be_unpacked(channels, layout):
    codes = torch.randint(0, 4, (2, channels, 3, 5), dtype=torch.uint8).contiguous(memory_format=layout)
    packed = pack(codes)
    assert packed.shape == (2, -(-channels // 4), 3, 5)
    assert packed.dtype == torch.uint8
    for byte in range(packed.shape[1]):  # by hand: the first channel has the lowest bits
        expected = sum(codes[:, c].int() * 4 ** (c % 4) for c in range(4 * byte, min(channels, 4 * byte + 4)))
        assert torch.equal(packed[:, byte].int(), expected)
    restored = unpack(packed, channels)
    assert torch.equal(restored, codes)
    if packed.shape[1] > 1:  # for a single channel both formats are the same
        assert packed.is_contiguous(memory_format=layout)
        assert restored.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_packed_switches_give_the_same_bits_and_save_four_times_less(layout):
    for size in SIZES:
        results, saved_bytes = [], []
        for packed in (False, True):
            torch.manual_seed(0)
            x = random_input("ties", (size[0] + 1, size[1]), torch.float32, layout)[:, :, 1:].requires_grad_()
            x = x.repeat(1, 4, 1, 1)  # 12 channels
            x.retain_grad()
            saved = []
            with torch.autograd.graph.saved_tensors_hooks(
                lambda t, saved=saved: saved.append(t.nbytes) or t, lambda t: t
            ):
                pooling = max_pool(x, packed=packed)
                restored = unpool(pooling.features, pooling.switches, pooling.size)
            saved_bytes.append([pooling.switches.nbytes, sum(saved)])
            (gradient,) = torch.autograd.grad((restored * restored.detach()).sum(), x, create_graph=True)
            results.append((pooling.features, restored, gradient))
        for one, other in zip(*results, strict=True):
            assert_same_bits(one, other)
        assert [4 * packed for packed in saved_bytes[1]] == saved_bytes[0]


def make_slim(network, packed):
    torch.manual_seed(0)
    return {
        "SegNet": lambda: SegNet(3, width=0.125, packed_switches=packed),
        "SegNetBasic": lambda: SegNetBasic(3, width=6, packed_switches=packed),
        "DeconvNet": lambda: DeconvNet(3, width=0.125, fc_width=8, packed_switches=packed),
    }[network]()


@pytest.mark.parametrize("network", ["SegNet", "SegNetBasic", "DeconvNet"])
def test_networks_with_packed_switches_compute_the_same_bits(network):
    results = []
    side = 225 if network == "DeconvNet" else 45
    image = torch.randn(2, 3, side, side - 5)
    for packed in (False, True):
        model = make_slim(network, packed).to(memory_format=torch.channels_last)
        pooling = model.encoder(image).pooled[-1]
        assert pooling.switches.shape[1] == -(-pooling.features.shape[1] // (4 if packed else 1))
        logits = model(image)
        logits.square().mean().backward()
        results.append([logits, *(parameter.grad for parameter in model.parameters())])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.slow
def test_packed_switches_compile_and_export():
    model = make_slim("SegNet", True).eval()
    height, width = torch.export.Dim("height", min=33, max=4096), torch.export.Dim("width", min=33, max=4096)
    program = torch.export.export(model, (torch.randn(1, 3, 64, 96),), dynamic_shapes=({2: height, 3: width},))
    image = torch.randn(1, 3, 47, 70)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(image), make_slim("SegNet", False).eval()(image))

    def function(x):
        pooling = max_pool(x, packed=True)
        return unpool(pooling.features * 2, pooling.switches, pooling.size)

    x, y = (torch.arange(60.0).view(1, 3, 4, 5).requires_grad_() for _ in range(2))
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(x)
    assert_same_bits(compiled, function(y))
    compiled.square().sum().backward()
    function(y).square().sum().backward()
    assert torch.equal(x.grad, y.grad)
