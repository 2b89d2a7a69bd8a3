"""Steps of compiled networks, and those of them that are left to PyTorch (random weights: steps do not depend on them).

python benchmarks/steps.py --page docs/steps.md
python benchmarks/steps.py --networks torchvision/resnet18,timm/ghostnet_100 --size 96
"""

import argparse
import gc
import sys
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch

import dsconv
import machine
from dsconv import QuantConfig, zoo

# Names, or NAME@SIZE of the images where a network wants other ones than most.
NETWORKS = """
torchvision/alexnet torchvision/convnext_tiny torchvision/deeplabv3_mobilenet_v3_large torchvision/densenet121
torchvision/efficientnet_b0 torchvision/efficientnet_v2_s torchvision/fcn_resnet50 torchvision/googlenet
torchvision/inception_v3@96 torchvision/lraspp_mobilenet_v3_large torchvision/mnasnet0_5 torchvision/mobilenet_v2
torchvision/mobilenet_v3_large torchvision/regnet_x_400mf torchvision/regnet_y_400mf torchvision/resnet18
torchvision/resnet50 torchvision/resnext50_32x4d torchvision/shufflenet_v2_x1_0 torchvision/squeezenet1_1
torchvision/swin_t torchvision/vgg11_bn
timm/convmixer_768_32 timm/convnext_atto timm/convnextv2_atto timm/coat_lite_tiny@224 timm/cs3darknet_s
timm/cspresnet50 timm/darknet53 timm/deit_tiny_patch16_224@224 timm/densenetblur121d timm/dla34 timm/dpn68
timm/eca_nfnet_l0 timm/ecaresnet26t timm/edgenext_xx_small timm/efficientformer_l1@224 timm/efficientnet_b0
timm/efficientnet_es timm/efficientnet_lite0 timm/efficientvit_b0 timm/efficientvit_m0@224 timm/ese_vovnet19b_dw
timm/fasternet_t0 timm/fastvit_t8@128 timm/fbnetc_100 timm/gcresnext26ts timm/gernet_s timm/ghostnet_100
timm/ghostnetv2_100 timm/hardcorenas_a timm/hgnetv2_b0 timm/hrnet_w18_small timm/inception_next_atto
timm/iformer_t@128 timm/lcnet_050 timm/legacy_xception@96 timm/levit_128s@224 timm/mambaout_femto
timm/mixer_s32_224@224 timm/mixnet_s
timm/mobilenetv1_100 timm/mobilenetv2_100 timm/mobilenetv3_small_100 timm/mobilenetv4_conv_small timm/mobileone_s0
timm/mobilevit_xxs timm/mobilevitv2_050 timm/nf_resnet26 timm/poolformer_s12 timm/pvt_v2_b0 timm/regnetz_005
timm/repghostnet_100 timm/repvgg_a0 timm/repvit_m0_9 timm/res2net50_26w_4s timm/resmlp_12_224@224 timm/resnest14d
timm/resnet26d timm/resnet50_gn timm/resnetblur18 timm/resnetrs50 timm/resnetv2_50x1_bit timm/rexnet_100
timm/selecsls42 timm/semnasnet_050 timm/seresnet18 timm/shvit_s1@128 timm/skresnet18 timm/spnasnet_100 timm/starnet_s1
timm/swiftformer_xs@224 timm/test_byobnet timm/tf_efficientnet_b0 timm/tf_mixnet_s timm/tf_mobilenetv3_small_100
timm/tinynet_e timm/tresnet_m timm/visformer_tiny@224 timm/vit_tiny_patch16_224@224 timm/vovnet39a timm/xception41@96
timm/xcit_nano_12_p16_224@224
"""


class Counted(NamedTuple):
    """Steps of a network, by whom they are executed; ``note`` says why there are none, or what is wrong with them."""

    name: str
    size: int
    steps: int
    by_pytorch: Counter[str]
    note: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ",".join(NETWORKS.split())
    parser.add_argument("--networks", default=names, help="NAME or NAME@SIZE, with commas; default: over 100")
    parser.add_argument("--size", type=int, default=64, help="of images, default %(default)s")
    parser.add_argument("--page", type=Path, help="file to which the tables are written as well")
    arguments = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))
    import torchvision_shim

    torchvision_shim.install()
    print(machine.describe())
    since = time.monotonic()
    counted = []
    for network in arguments.networks.split(","):
        name, _, size = network.partition("@")
        counted.append(count(name, int(size or arguments.size)))
        print(as_row(counted[-1]), flush=True)
        gc.collect()
    tables = f"{summary(counted)}\n\n{by_operator(counted)}\n\n{by_network(counted)}\n"
    print(f"\n{summary(counted)}\n\n{by_operator(counted)}\n\nin {time.monotonic() - since:.0f} s")
    if arguments.page is not None:
        arguments.page.write_text(f"{_PAGE}{tables}")


def count(name: str, size: int) -> Counted:
    """Compile a network for images of this size, and compare its bits with those of the quantized one."""
    try:
        torch.manual_seed(0)
        model = zoo.build(name, weights="random")
        qmodel = dsconv.quantize(model, QuantConfig(weight_rule="paper"))
        x = torch.randn(2, 3, size, size, dtype=torch.float32, device="cpu")
        compiled = dsconv.compile(qmodel, x[:1])
        with torch.inference_mode():
            same = all(torch.equal(a, b) for a, b in zip(tensors(compiled(x)), tensors(qmodel(x)), strict=True))
    except Exception as error:  # a network that fails is a result
        first = (str(error).splitlines() or [""])[0]
        return Counted(name, size, 0, Counter(), f"failed: {type(error).__name__}: {first[:160]}")
    left = Counter(step.operator.removeprefix("aten.") for step in compiled.plan.in_pytorch)
    return Counted(name, size, len(compiled.plan.steps), left, "" if same else "other bits than layer by layer")


def tensors(output: object) -> list[torch.Tensor]:
    """Return the tensors that a network puts out."""
    if isinstance(output, torch.Tensor):
        return [output]
    values = output.values() if isinstance(output, dict) else output
    return [tensor for value in values for tensor in tensors(value)]  # type: ignore[attr-defined]


def as_row(counted: Counted) -> str:
    """Return a row of the table of networks."""
    operators = ", ".join(f"{operator} {n}" for operator, n in counted.by_pytorch.most_common())
    note = ": ".join(filter(None, (counted.note, operators)))
    numbers = f"{counted.steps} | {counted.by_pytorch.total()}" if counted.steps else "- | -"
    return f"| {counted.name} | {counted.size} | {numbers} | {note} |"


def summary(counted: list[Counted]) -> str:
    """Return the totals, as a sentence."""
    made = [c for c in counted if c.steps]
    steps, left = sum(c.steps for c in made), sum(c.by_pytorch.total() for c in made)
    alone = sum(not c.by_pytorch for c in made)
    failed, other = len(counted) - len(made), sum(bool(c.note) for c in made)
    return (
        f"{len(made)} networks of {steps} steps, {left} of them by PyTorch; {alone} networks have none of those. "
        f"{failed} could not be compiled, and {other} have other bits than layer by layer."
    )


def by_operator(counted: list[Counted]) -> str:
    """Return the table of operators that PyTorch executes."""
    steps = sum((c.by_pytorch for c in counted), Counter[str]())
    networks = Counter(operator for c in counted for operator in c.by_pytorch)
    rows = [f"| {operator} | {n} | {networks[operator]} |" for operator, n in steps.most_common()]
    return "\n".join(["| by PyTorch | steps | networks |", "|---|---|---|", *rows])


def by_network(counted: list[Counted]) -> str:
    """Return the table of networks."""
    head = ["| network | images | steps | by PyTorch | which |", "|---|---|---|---|---|"]
    return "\n".join([*head, *map(as_row, counted)])


_PAGE = """# What is left to PyTorch

Made by `python benchmarks/steps.py --page docs/steps.md`: networks of torchvision and timm with random weights,
quantized and compiled for square images. PyTorch executes what [compiled programs](kernels.md#programs) have no step
for. That takes longer, and the steps before and after it exchange float32 where they could exchange mantissas.
Norms, softmax and activations with an exponential have bits of their own in compiled programs, as averages may.

"""


if __name__ == "__main__":
    main()
