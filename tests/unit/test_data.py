"""Preprocessing equals torchvision's and timm's; folders and labels are read completely or give a clear error."""

import importlib.util
import io
import itertools
import json
import os
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError
from torch.utils.data import DataLoader, TensorDataset

from dsconv.data import EXTENSIONS, ImageFolder, Preprocess, batches
from dsconv.errors import ConfigError, DataError

PLAIN = Preprocess()


def picture(width: int = 8, height: int = 8, seed: int = 0, mode: str = "RGB") -> Image.Image:
    data = torch.randint(256, (width * height * 3,), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.frombytes("RGB", (width, height), bytes(data.tolist())).convert(mode)


def save(path: Path, seed: int = 0, size: tuple[int, int] = (8, 8)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(*size, seed).save(path)
    return path


def labelled(folder: Path, text: str, count: int = 3) -> Path:
    for i in range(count):
        save(folder / f"{i}.png", seed=i)
    (folder / "labels.csv").write_text(text)
    return folder


def load_nets(shared: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("nets", shared / "nets.py")
    assert spec is not None and spec.loader is not None
    nets = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(nets)
    return nets


sides = st.integers(1, 70)


class TestPreprocess:
    @given(
        width=sides, height=sides, resize=sides, crop=sides, kind=st.sampled_from(["nearest", "bilinear", "bicubic"])
    )
    @settings(max_examples=80, deadline=None)
    def test_equals_the_torchvision_preset_bit_for_bit(
        self, width: int, height: int, resize: int, crop: int, kind: str
    ) -> None:
        presets = pytest.importorskip("torchvision.transforms._presets")
        modes = pytest.importorskip("torchvision.transforms").InterpolationMode
        preset = presets.ImageClassification(crop_size=crop, resize_size=resize, interpolation=modes(kind))
        image = picture(width, height)
        assert torch.equal(Preprocess.from_torchvision(preset)(image), preset(image))

    @pytest.mark.parametrize("name", ["ResNet50_Weights", "EfficientNet_B0_Weights", "ViT_B_16_Weights"])
    def test_reads_torchvision_weights(self, name: str) -> None:
        weights = getattr(pytest.importorskip("torchvision.models"), name).DEFAULT
        image = picture(500, 375)
        assert torch.equal(Preprocess.from_torchvision(weights)(image), weights.transforms()(image))

    @pytest.mark.parametrize(
        "config",
        [
            {},
            {"crop_pct": 0.95, "interpolation": "bilinear"},
            {"crop_pct": 0.9, "crop_mode": "squash"},
            {"input_size": (3, 96, 64), "crop_mode": "squash"},
            {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "crop_pct": 1.0},
        ],
    )
    @pytest.mark.parametrize("size", [(300, 200), (90, 333), (30, 40)])
    def test_equals_the_timm_transform(self, config: dict[str, object], size: tuple[int, int]) -> None:
        data = pytest.importorskip("timm.data")
        model = torch.nn.Identity()
        model.pretrained_cfg = {"input_size": (3, 96, 96), **config}
        expected = data.create_transform(**data.resolve_model_data_config(model))(picture(*size))
        torch.testing.assert_close(Preprocess.from_timm(model)(picture(*size)), expected, rtol=0, atol=1e-6)

    def test_reads_a_real_timm_model(self) -> None:
        timm = pytest.importorskip("timm")
        preprocess = Preprocess.from_timm(timm.create_model("resnet18.a1_in1k"))
        assert (preprocess.resize, preprocess.crop, preprocess.interpolation) == (235, (224, 224), "bicubic")

    @pytest.mark.parametrize(
        "config", [{"crop_mode": "border"}, {"input_size": (3, 96, 64)}, {"input_size": (4, 9, 9)}]
    )
    def test_refuses_a_timm_configuration_it_cannot_express(self, config: dict[str, object]) -> None:
        pytest.importorskip("timm")
        model = torch.nn.Identity()
        model.pretrained_cfg = {"input_size": (3, 96, 96), **config}
        with pytest.raises(ConfigError, match="not supported"):
            Preprocess.from_timm(model)

    def test_a_model_without_timm_configuration_is_refused(self) -> None:
        pytest.importorskip("timm")
        with pytest.raises(ConfigError, match="no timm configuration"):
            Preprocess.from_timm(torch.nn.Identity())

    @pytest.mark.parametrize("source", [None, torch.nn.Identity(), "resnet50"])
    def test_something_that_is_no_torchvision_transform_is_refused(self, source: object) -> None:
        with pytest.raises(ConfigError, match="from_torchvision expects"):
            Preprocess.from_torchvision(source)

    def test_channels_scale_mean_and_std(self) -> None:
        image = Image.new("RGB", (2, 1), (255, 128, 0))
        assert PLAIN(image)[:, 0, 0].tolist() == pytest.approx([1, 128 / 255, 0])
        caffe = Preprocess(channels="bgr", scale=255, mean=(104, 117, 123))
        assert caffe(image)[:, 0, 0].tolist() == [-104, 11, 132]
        gray = Preprocess(channels="gray", mean=0.5, std=0.25)(image)
        assert gray.shape == (1, 1, 2)
        assert gray[0, 0, 0].item() == pytest.approx((image.convert("L").getpixel((0, 0)) / 255 - 0.5) / 0.25)

    @pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr"])
    def test_every_8_bit_mode_becomes_rgb(self, mode: str) -> None:
        image = picture(mode=mode)
        assert torch.equal(PLAIN(image), PLAIN(image.convert("RGB")))

    @pytest.mark.parametrize(
        ("kind", "options"),
        [
            ("JPEG", {"quality": 100}),
            ("PNG", {}),
            ("WEBP", {"lossless": True}),
            ("TIFF", {}),
            ("TIFF", {"compression": "tiff_lzw"}),
        ],
    )
    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_pictures_are_turned_as_their_exif_orientation_says(
        self, kind: str, options: dict[str, object], orientation: int
    ) -> None:
        # Grey levels that distinguish the corners after compression.
        corners = torch.tensor([[0, 80], [160, 240]], dtype=torch.uint8)
        upright = corners.repeat_interleave(16, 0).repeat_interleave(32, 1)
        # The pixels that each orientation stores in the file, by the sides in its first row and column in the standard.
        stored = {
            1: upright,
            2: upright.flip(1),
            3: upright.flip(0, 1),
            4: upright.flip(0),
            5: upright.T,
            6: upright.T.flip(0),
            7: upright.T.flip(0, 1),
            8: upright.T.flip(1),
        }[orientation]
        exif, file = Image.Exif(), io.BytesIO()
        exif[0x0112] = orientation
        Image.fromarray(stored.contiguous().numpy()).convert("RGB").save(file, kind, exif=exif, **options)
        x = Preprocess(channels="gray")(Image.open(file))[0]
        assert x.shape == upright.shape
        torch.testing.assert_close(x * 255, upright.float(), atol=3, rtol=0)

    @pytest.mark.filterwarnings("ignore:Corrupt EXIF")
    @pytest.mark.parametrize(
        "exif",
        [
            b"Exif\0\0",
            b"Exif\0\0MM\0*\0\0\0\x08\xff\xffgarbage",
            b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x01\0\0\0A\0\0\0",
            b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x09\0\0\0",
        ],
    )
    def test_a_picture_with_broken_exif_stays_as_it_is(self, exif: bytes) -> None:
        file = io.BytesIO()
        picture(12, 8).save(file, "JPEG", exif=exif)
        plain = io.BytesIO()
        picture(12, 8).save(plain, "JPEG")
        assert torch.equal(PLAIN(Image.open(file)), PLAIN(Image.open(plain)))

    @pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
    def test_the_first_frame_of_an_animation_counts(self, kind: str) -> None:
        frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
        file = io.BytesIO()
        frames[0].save(file, kind, save_all=True, append_images=frames[1:])
        assert PLAIN(Image.open(file))[:, 4, 4].tolist() == pytest.approx([1, 0, 0], abs=0.01)

    @pytest.mark.filterwarnings("ignore:Palette images with Transparency")
    @pytest.mark.parametrize("mode", ["LA", "RGBA", "P"])
    def test_transparency_is_dropped_and_the_colours_below_it_count(self, mode: str) -> None:
        opaque = picture(mode="RGB").quantize(16) if mode == "P" else picture(mode="L" if mode == "LA" else "RGB")
        file = io.BytesIO()
        if mode == "P":
            opaque.save(file, "PNG", transparency=bytes(range(0, 160, 10)))
        else:
            clear = opaque.copy()
            clear.putalpha(60)
            clear.save(file, "PNG")
        assert torch.equal(PLAIN(Image.open(file)), PLAIN(opaque))

    def test_a_photograph_for_print_has_the_colours_of_the_screen(self) -> None:
        file = io.BytesIO()
        Image.new("RGB", (16, 16), (250, 120, 10)).convert("CMYK").save(file, "JPEG", quality=95)
        image = Image.open(file)
        assert image.mode == "CMYK"
        assert (PLAIN(image)[:, 8, 8] * 255).tolist() == pytest.approx([250, 120, 10], abs=4)

    @pytest.mark.parametrize("mode", ["I", "F", "I;16"])
    def test_more_than_8_bits_are_refused(self, mode: str) -> None:
        with pytest.raises(DataError, match="8 bits"):
            PLAIN(Image.new(mode, (4, 4)))

    @pytest.mark.parametrize(
        ("setting", "value", "message"),
        [
            ("resize", 0, "resize"),
            ("resize", "big", "resize"),
            ("crop", (3, -1), "crop"),
            ("mean", (0.1, 0.2), "mean must hold 1 or 3"),
            ("mean", float("nan"), "mean"),
            ("std", (1, 0, 1), "std must be positive"),
            ("scale", -1, "scale"),
            ("interpolation", "sinc", "interpolation"),
            ("channels", "rgba", "channels"),
            ("colour", "rgb", "colour"),
        ],
    )
    def test_bad_settings_are_named_in_one_paragraph(self, setting: str, value: object, message: str) -> None:
        with pytest.raises(ConfigError, match=message) as caught:
            Preprocess(**{setting: value})
        assert "\n" not in str(caught.value)
        assert "Value error" not in str(caught.value)
        with pytest.raises(ValidationError, match=message):
            Preprocess.model_validate({setting: value})

    def test_gray_takes_one_mean_only(self) -> None:
        with pytest.raises(ConfigError, match="mean must hold 1 numbers for gray images, got 3"):
            Preprocess(channels="gray", mean=(0.1, 0.2, 0.3))

    @given(
        st.builds(
            Preprocess,
            resize=st.none() | sides | st.tuples(sides, sides),
            crop=st.none() | sides | st.tuples(sides, sides),
            mean=st.floats(-1, 1) | st.tuples(*[st.floats(-1, 1)] * 3),
            scale=st.sampled_from([1.0, 255.0]),
            channels=st.sampled_from(["rgb", "bgr"]),
        )
    )
    def test_survives_json(self, preprocess: Preprocess) -> None:
        assert Preprocess(**json.loads(preprocess.model_dump_json())) == preprocess

    def test_is_immutable(self) -> None:
        with pytest.raises(ValueError, match="frozen"):
            PLAIN.scale = 2.0


class TestImageFolder:
    def test_class_folders_are_numbered_by_sorted_name_at_any_depth_and_empty_ones_count(self, tmp_path: Path) -> None:
        for name in ("b/1.png", "b/deep/2.PNG", "d/3.Jpg", ".hidden/4.png", "b/.thumbs/5.png", "b/.6.png"):
            save(tmp_path / name)
        (tmp_path / "b/notes.txt").write_text("not an image")
        (tmp_path / "c").mkdir()
        folder = ImageFolder(tmp_path, PLAIN)
        assert [str(file.relative_to(tmp_path)) for file in folder.files] == ["b/1.png", "b/deep/2.PNG", "d/3.Jpg"]
        assert folder.labels is not None and folder.labels.tolist() == [0, 0, 2]
        assert folder.classes == ["b", "c", "d"]

    def test_classes_give_the_order_of_the_network(self, tmp_path: Path) -> None:
        save(tmp_path / "cat/1.png"), save(tmp_path / "dog/1.png")
        folder = ImageFolder(tmp_path, PLAIN, classes=["dog", "horse", "cat"])
        assert folder.labels is not None and folder.labels.tolist() == [2, 0]
        assert folder.order == "given" and folder.order_in_words == "as given: dog, horse, cat"
        with pytest.raises(DataError, match=r"sub-folder cat .* not one of the 1 classes"):
            ImageFolder(tmp_path, PLAIN, classes=["dog"])

    @pytest.mark.parametrize(
        ("names", "order", "expected"),
        [
            (["1", "10", "2"], "numbers", ["1", "2", "10"]),
            (["10", "-1", "0", "-2"], "numbers", ["-2", "-1", "0", "10"]),
            (["001", "2", "0010"], "numbers", ["001", "2", "0010"]),
            (["00", "01", "10"], "numbers", ["00", "01", "10"]),
            (["1", "10", "2", "other"], "text", ["1", "10", "2", "other"]),
            (["c1", "c10", "c2"], "text", ["c1", "c10", "c2"]),
            (["1.5", "1", "10"], "text", ["1", "1.5", "10"]),
            (["\u0662", "1"], "text", ["1", "\u0662"]),
        ],
    )
    def test_folders_named_by_whole_numbers_are_classes_in_the_order_of_the_numbers(
        self, tmp_path: Path, names: list[str], order: str, expected: list[str]
    ) -> None:
        for seed, name in enumerate(names):
            save(tmp_path / name / "1.png", seed)
        folder = ImageFolder(tmp_path, PLAIN)
        assert folder.classes == expected and folder.order == order
        assert folder.labels is not None
        assert [folder.classes[label] for label in folder.labels] == [file.parent.name for file in folder.files]
        assert expected[-1] in folder.order_in_words

    def test_a_thousand_numbered_classes_are_in_order(self, tmp_path: Path) -> None:
        for i in range(1, 1001):
            (tmp_path / str(i)).mkdir()
        for i in (1, 9, 10, 999, 1000):
            save(tmp_path / f"{i}/1.png")
        folder = ImageFolder(tmp_path, PLAIN)
        assert folder.classes == [str(i) for i in range(1, 1001)]
        assert folder.labels is not None and folder.labels.tolist() == [0, 8, 9, 998, 999]
        assert folder.order_in_words == "by their numbers: 1, 2, 3, ..., 1000"

    def test_two_folders_of_the_same_number_need_an_order(self, tmp_path: Path) -> None:
        save(tmp_path / "1/1.png"), save(tmp_path / "01/1.png")
        with pytest.raises(DataError, match=r"class folders 01 and 1 of .* are the same number: .*classes="):
            ImageFolder(tmp_path, PLAIN)
        assert ImageFolder(tmp_path, PLAIN, classes=["1", "01"]).labels.tolist() == [1, 0]

    @pytest.mark.parametrize(
        ("names", "doubtful"),
        [
            (["c1", "c10", "c2"], True),
            (["1", "10", "2", "other"], True),
            (["c01", "c02", "c10"], False),
            (["b"], False),
            ([str(i) for i in range(12)], False),
        ],
    )
    def test_an_order_of_text_that_is_not_that_of_the_numbers_in_it_is_doubtful(
        self, tmp_path: Path, names: list[str], doubtful: bool
    ) -> None:
        for name in names:
            save(tmp_path / name / "1.png")
        assert ImageFolder(tmp_path, PLAIN).is_doubtful == doubtful
        assert not ImageFolder(tmp_path, PLAIN, classes=names).is_doubtful

    @pytest.mark.parametrize(
        ("classes", "message"),
        [
            ([], r"expected one or more names, none of them empty, got \[\]"),
            (["a", ""], "none of them empty"),
            ("ab", "expected one or more names, none of them empty, got 'ab'"),
            ([0, 1], "expected one or more names"),
            (["a", "b", "a"], "expected each name once, got 'a' more than once"),
        ],
    )
    def test_classes_that_are_no_names_are_refused(self, tmp_path: Path, classes: list[str], message: str) -> None:
        save(tmp_path / "a/1.png")
        with pytest.raises(DataError, match=f"classes: .*{message}"):
            ImageFolder(tmp_path, PLAIN, classes=classes)

    def test_classes_name_the_indices_of_labels_csv(self, tmp_path: Path) -> None:
        labelled(tmp_path, "file,class_index\n0.png,0\n1.png,2\n")
        folder = ImageFolder(tmp_path, PLAIN, classes=["a", "b", "c"])
        assert folder.classes == ["a", "b", "c"] and folder.labels.tolist() == [0, 2] and folder.order is None
        with pytest.raises(DataError, match=r"labels.csv, line 3: class_index must be below 2, .* got 2"):
            ImageFolder(tmp_path, PLAIN, classes=["a", "b"])

    def test_labels_csv_decides_files_order_and_labels(self, tmp_path: Path) -> None:
        folder = ImageFolder(labelled(tmp_path, "\ufefffile, class_index\n2.png, 7\n\n./0.png,0\n"), PLAIN)
        assert [(file.name, label) for file, (_, label) in zip(folder.files, folder, strict=True)] == [
            ("2.png", 7),
            ("0.png", 0),
        ]
        assert torch.equal(folder[0][0], PLAIN(picture(seed=2)))

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "line 1: expected the header file,class_index"),
            ("name,label\n0.png,1\n", "line 1: expected the header file,class_index"),
            ("file,class_index\n", "lists no images"),
            ("file,class_index\n0.png,1\nmissing.png,2\n", "line 3: there is no file 'missing.png'"),
            ("file,class_index\n0.png,1\n1.png,1.5\n", "line 3: class_index must be a whole number from 0, got '1.5'"),
            ("file,class_index\n0.png,-1\n", "line 2: class_index must be a whole number"),
            ("file,class_index\n0.png\n", "line 2: class_index must be a whole number from 0, got None"),
            ("file,class_index\n0.png,99999999999999999999\n", "line 2: class_index must be"),
            ("file,class_index\n0.png,1\n1.png,1\n./0.png,2\n", "line 4: the file './0.png' is listed a second time"),
        ],
    )
    def test_a_mistake_in_labels_csv_is_named_with_its_line(self, tmp_path: Path, text: str, message: str) -> None:
        with pytest.raises(DataError, match=message):
            ImageFolder(labelled(tmp_path, text), PLAIN)

    def test_labels_csv_that_is_not_text_is_refused(self, tmp_path: Path) -> None:
        (labelled(tmp_path, "") / "labels.csv").write_bytes(b"file,class_index\n\xff\xfe,1\n")
        with pytest.raises(DataError, match=r"labels.csv cannot be read"):
            ImageFolder(tmp_path, PLAIN)

    def test_without_classes_or_labels_the_images_are_unlabelled(self, tmp_path: Path) -> None:
        save(tmp_path / "b.png", 1), save(tmp_path / "a.png", 0)
        (tmp_path / "empty").mkdir()
        folder = ImageFolder(str(tmp_path), PLAIN)
        assert len(folder) == 2 and folder.labels is None and folder.classes is None
        assert torch.equal(folder[1], PLAIN(picture(seed=1)))

    def test_missing_empty_and_ambiguous_folders_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=f"{tmp_path}/nowhere does not exist"):
            ImageFolder(tmp_path / "nowhere", PLAIN)
        with pytest.raises(DataError, match=r"holds no images: looked for \.bmp, .*labels.csv"):
            ImageFolder(tmp_path, PLAIN)
        file = save(tmp_path / "1.png")
        with pytest.raises(DataError, match="is a file, not a folder"):
            ImageFolder(file, PLAIN)
        save(tmp_path / "cat/2.png")
        with pytest.raises(DataError, match=r"holds images \(1.png, ...\) beside sub-folders with images \(cat"):
            ImageFolder(tmp_path, PLAIN)

    def test_a_broken_image_raises_with_its_name_when_asked_for_directly(self, tmp_path: Path) -> None:
        (tmp_path / "bad.png").write_bytes(b"")
        with pytest.raises(DataError, match=r"bad\.png cannot be read"):
            ImageFolder(tmp_path, PLAIN)[0]

    def test_links_are_followed_and_each_image_counts_once(self, tmp_path: Path) -> None:
        store, root = tmp_path / "store", tmp_path / "root"
        save(store / "more/2.png", 2), save(store / "3.png", 3)
        save(root / "a/1.png", 1)
        (root / "a/up").symlink_to("..")
        (root / "a/self").symlink_to(".")
        (root / "a/out").symlink_to(tmp_path)
        (root / "a/everything").symlink_to("/")
        (root / "a/again.png").symlink_to("1.png")
        (root / "a/more").symlink_to(store / "more")
        (root / "a/more too").symlink_to(store / "more")
        (root / "b").symlink_to(store, target_is_directory=True)
        folder = ImageFolder(root, PLAIN)
        assert [str(file.relative_to(root)) for file in folder.files] == ["a/1.png", "b/3.png", "b/more/2.png"]
        assert folder.classes == ["a", "b"] and folder.labels.tolist() == [0, 1, 1]
        # Folders that two classes share are reported, links back are not.
        assert [(Path(path).name, reason) for path, reason in folder.left_out] == [
            (name, f"it is the same as {root}/b/more and counts as part of it") for name in ("more", "more too")
        ]

    def test_an_image_counts_for_its_own_folder_before_that_of_a_link(self, tmp_path: Path) -> None:
        save(tmp_path / "b/deep/1.png", 1), save(tmp_path / "b/2.png", 2)
        (tmp_path / "a").mkdir()
        (tmp_path / "a/1.png").symlink_to("../b/deep/1.png")
        (tmp_path / "a/deep").symlink_to("../b/deep")
        folder = ImageFolder(tmp_path, PLAIN)
        assert [str(file.relative_to(tmp_path)) for file in folder.files] == ["b/2.png", "b/deep/1.png"]
        assert folder.labels.tolist() == [1, 1]
        assert sorted(Path(path).name for path, _ in folder.left_out) == ["1.png", "deep"]

    def test_a_link_to_the_folder_itself_or_one_above_it_is_no_class(self, tmp_path: Path) -> None:
        save(tmp_path / "root/b/1.png"), save(tmp_path / "aside/2.png")
        (tmp_path / "root/a").symlink_to(".")
        (tmp_path / "root/c").symlink_to("..")
        folder = ImageFolder(tmp_path / "root", PLAIN)
        assert folder.classes == ["b"] and len(folder) == 1 and folder.left_out == []

    def test_links_among_unlabelled_images(self, tmp_path: Path) -> None:
        root = tmp_path / "root"
        save(tmp_path / ".store/9.png", 9), save(root / "1.png")
        (root / "0.png").symlink_to("1.png")
        (root / "2.png").symlink_to("../.store/9.png")
        (root / "3.png").hardlink_to(root / "1.png")
        (root / "sub").mkdir()
        (root / "sub/1.png").symlink_to("../1.png")
        folder = ImageFolder(root, PLAIN)
        assert [file.name for file in folder.files] == ["1.png", "2.png"] and folder.labels is None
        assert folder.left_out == []
        (tmp_path / "link").symlink_to("root")
        assert len(ImageFolder(tmp_path / "link", PLAIN)) == 2

    def test_links_that_lead_nowhere_and_images_that_are_not_read_are_told(self, tmp_path: Path) -> None:
        save(tmp_path / "a/1.png"), save(tmp_path / "b/1.png")
        (tmp_path / "a/gone.png").symlink_to("nowhere.png")
        (tmp_path / "a/gone").symlink_to("nowhere")
        (tmp_path / "a/loop.png").symlink_to("loop.png")
        (tmp_path / "aside.png").symlink_to("nowhere.png")
        (tmp_path / "b/2.HEIC").touch()
        os.mkfifo(tmp_path / "b/pipe.png")
        source = batches(tmp_path, preprocess=PLAIN)
        for _ in range(2):
            ((x, labels),) = source
            assert len(x) == 2 and labels.tolist() == [0, 1]
            reasons = {Path(path).name: reason for path, reason in source.broken}
            assert reasons == {
                "aside.png": "the link cannot be followed: No such file or directory",
                "gone.png": "the link cannot be followed: No such file or directory",
                "gone": "the link cannot be followed: No such file or directory",
                "loop.png": "the link cannot be followed: Too many levels of symbolic links",
                "2.HEIC": "this format is not supported: convert it to PNG or JPEG",
                "pipe.png": "it is not a regular file",
            }

    def test_a_class_folder_behind_a_broken_link_is_an_error(self, tmp_path: Path) -> None:
        save(tmp_path / "b/1.png")
        (tmp_path / "a").symlink_to("nowhere")
        with pytest.raises(DataError, match=r"The link .*/a beside the class folders is broken: restore"):
            ImageFolder(tmp_path, PLAIN)

    def test_a_folder_of_broken_links_alone_says_so(self, tmp_path: Path) -> None:
        (tmp_path / "1.png").symlink_to("nowhere")
        with pytest.raises(DataError, match=r"holds no images: .* Left out: .*1.png: the link cannot be followed"):
            ImageFolder(tmp_path, PLAIN)

    def test_something_else_as_preprocess_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"must be a dsconv\.data\.Preprocess, got function"):
            ImageFolder(tmp_path, lambda image: image)

    def test_every_extension_can_be_decoded(self, tmp_path: Path) -> None:
        for extension in sorted(EXTENSIONS):
            image = picture(mode="L") if extension == ".pgm" else picture()
            image.save(tmp_path / f"image{extension.upper()}")
        source = batches(tmp_path, preprocess=PLAIN)
        assert sum(len(x) for x, _ in source) == len(EXTENSIONS) and source.broken == []


class TestBatches:
    def test_a_tensor_is_split_and_can_be_read_twice(self) -> None:
        images = torch.randn(10, 3, 4, 4)
        source = batches(images, batch_size=4)
        assert source.total == 10 and source.folder is None
        for _ in range(2):
            assert torch.equal(torch.cat([x for x, _ in source]), images)
        assert [len(x) for x, _ in source] == [4, 4, 2]

    @pytest.mark.parametrize("labels", [torch.tensor([1, 0, 2]), [1, 0, 2], torch.tensor([1, 0, 2], dtype=torch.uint8)])
    def test_pairs_keep_their_labels(self, labels: object) -> None:
        ((_, got),) = batches([(torch.zeros(3, 1, 2, 2), labels)])
        assert got is not None and got.dtype == torch.int64 and got.tolist() == [1, 0, 2]

    def test_a_data_loader_a_list_and_a_generator_are_all_iterables_of_batches(self) -> None:
        x, y = torch.randn(7, 3, 2, 2), torch.arange(7)
        loader = DataLoader(TensorDataset(x, y), batch_size=3)
        for images, total in ((loader, 7), (list(loader), 7), ((batch for batch in loader), None)):
            source = batches(images)
            assert source.total == total
            assert torch.equal(torch.cat([labels for _, labels in source if labels is not None]), y)
        assert batches(list(x.split(2))).total == 7

    @pytest.mark.parametrize("workers", [0, 2])
    def test_a_folder_is_read_in_order_and_broken_files_are_reported_not_fatal(
        self, tmp_path: Path, workers: int
    ) -> None:
        for i in range(7):
            save(tmp_path / f"{i % 2}" / f"{i}.png", seed=i)
        whole = (tmp_path / "0/0.png").read_bytes()
        (tmp_path / "0/truncated.png").write_bytes(whole[: len(whole) // 2])
        (tmp_path / "1/text.jpg").write_text("hello")
        (tmp_path / "1/zero.jpg").touch()
        source = batches(tmp_path, preprocess=PLAIN, batch_size=3, workers=workers)
        for _ in range(2):
            images, labels = zip(*source, strict=True)
            expected = torch.stack([PLAIN(picture(seed=i)) for i in (0, 2, 4, 6, 1, 3, 5)])
            assert torch.equal(torch.cat(images), expected)
            assert torch.cat(labels).tolist() == [0] * 4 + [1] * 3
            assert [Path(path).name for path, _ in source.broken] == ["truncated.png", "text.jpg", "zero.jpg"]
            assert all(reason and "\n" not in reason for _, reason in source.broken)
        assert source.total == 10

    def test_an_image_folder_is_images_too(self, tmp_path: Path) -> None:
        save(tmp_path / "a/1.png"), save(tmp_path / "b/2.png")
        ((x, y),) = batches(ImageFolder(tmp_path, PLAIN, classes=["b", "a"]))
        assert x.shape == (2, 3, 8, 8) and y is not None and y.tolist() == [1, 0]

    @given(total=st.integers(1, 20), limit=st.integers(1, 25), batch_size=st.integers(1, 7))
    def test_a_limit_takes_the_first_images_and_never_reads_further(
        self, total: int, limit: int, batch_size: int
    ) -> None:
        images, read = torch.arange(total).float()[:, None, None, None], 0

        def reading():
            nonlocal read
            for x in images.split(batch_size):
                read += len(x)
                yield x, torch.zeros(len(x), dtype=torch.int64)

        for source in (batches(images, batch_size=batch_size, limit=limit), batches(reading(), limit=limit)):
            got = torch.cat([x for x, _ in source])
            assert torch.equal(got, images[:limit])
        assert read < limit + batch_size

    @pytest.mark.parametrize("limit", [1, 2, 4, 9, 50])
    def test_a_limit_is_spread_over_a_folder(self, tmp_path: Path, limit: int) -> None:
        for i in range(9):
            save(tmp_path / f"{i // 3}" / f"{i}.png", seed=i)
        source = batches(tmp_path, preprocess=PLAIN, limit=limit, batch_size=2)
        labels = torch.cat([y for _, y in source if y is not None]).tolist()
        assert len(labels) == source.total == min(limit, 9)
        assert len(set(labels)) == min(limit, 3)
        places = [int(file.stem) for file in source.files]
        steps = {after - before for before, after in itertools.pairwise(places)}
        assert places[0] == 0 and steps <= {9 // min(limit, 9), -(-9 // min(limit, 9))}

    @pytest.mark.parametrize("workers", [0, 1])
    def test_images_of_different_sizes_need_a_crop_or_batches_of_one(self, tmp_path: Path, workers: int) -> None:
        save(tmp_path / "a.png", size=(8, 8)), save(tmp_path / "b.png", size=(8, 9))
        for batch_size in (2, 32):
            with pytest.raises(
                DataError, match=r"b\.png has the shape \(3, 9, 8\), but .*a\.png \(3, 8, 8\): add a crop"
            ):
                list(batches(tmp_path, preprocess=PLAIN, batch_size=batch_size, workers=workers))
        assert len(list(batches(tmp_path, preprocess=PLAIN, batch_size=1, workers=workers))) == 2
        assert len(list(batches(tmp_path, preprocess=Preprocess(crop=8), workers=workers))) == 1

    def test_sizes_that_differ_only_between_batches_are_refused_as_well(self, tmp_path: Path) -> None:
        for i in range(4):
            save(tmp_path / f"{i}.png", size=(8, 8 + i // 2))
        with pytest.raises(DataError, match="add a crop"):
            list(batches(tmp_path, preprocess=PLAIN, batch_size=2))

    def test_reading_a_folder_leaves_the_random_state_alone(self, tmp_path: Path) -> None:
        save(tmp_path / "a.png")
        before = torch.get_rng_state()
        list(batches(tmp_path, preprocess=PLAIN))
        assert torch.equal(before, torch.get_rng_state())

    @pytest.mark.parametrize(
        ("images", "message"),
        [
            (3, "images must be a tensor .* got int"),
            (torch.zeros(8), r"got a torch.float32 tensor \(8,\).*unsqueeze"),
            (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "got a torch.uint8 tensor"),
            (
                [{"x": torch.zeros(3, 8, 8)}],
                r"must be preprocessed batches .* got dict\..* needs dsconv.Inputs around it",
            ),
            ([torch.zeros(2, 3, 8, 8).numpy()], "got ndarray"),
            ((torch.zeros(2, 3, 8, 8), torch.zeros(2)), "one pair a list around it"),
            ([(torch.zeros(2, 3, 8, 8), [1])], "labels must be 2 integers"),
            ([(torch.zeros(2, 3, 8, 8), [0.5, 1.0])], "labels must be 2 integers.* torch.float32"),
            ([(torch.zeros(2, 3, 8, 8), ["cat", "dog"])], "labels must be integers"),
            ([(torch.zeros(2, 3, 8, 8), [0, 1]), torch.zeros(2, 3, 8, 8)], "Some batches have labels"),
        ],
    )
    def test_anything_else_is_refused(self, images: object, message: str) -> None:
        with pytest.raises(DataError, match=message):
            list(batches(images))

    @pytest.mark.parametrize(("name", "value"), [("batch_size", 0), ("workers", -1), ("limit", 0), ("limit", 1.5)])
    def test_numbers_out_of_range_are_named(self, name: str, value: object) -> None:
        with pytest.raises(ConfigError, match=f"{name}: expected a whole number"):
            batches(torch.zeros(1, 3, 8, 8), **{name: value})

    def test_preprocess_is_needed_for_a_path_and_refused_elsewhere(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="preprocess must say how to read it"):
            batches(tmp_path)
        with pytest.raises(DataError, match="preprocessed already"):
            batches(torch.zeros(1, 3, 8, 8), preprocess=PLAIN)
        save(tmp_path / "a.png")
        with pytest.raises(DataError, match="an ImageFolder with a preprocess"):
            batches(ImageFolder(tmp_path, PLAIN), preprocess=PLAIN)


@pytest.mark.parametrize("name", ["tiny_darknet", "squeezenet1_1", "cifar_resnet20"])
def test_equals_the_preprocessing_of_the_shared_networks(shared: Path, tmp_path: Path, name: str) -> None:
    nets = load_nets(shared)
    kinds: dict[str, Preprocess] = {
        "tiny_darknet": Preprocess(crop=224),
        "squeezenet1_1": Preprocess(crop=224, channels="bgr", scale=255, mean=(104, 117, 123)),
        "cifar_resnet20": Preprocess(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
    }
    if name == "cifar_resnet20":
        x = nets.images("cifar10", labelled=False)[0][:4]
    else:  # 256 pixels: a centre crop to 224 needs no rounding, whose conventions differ
        files = sorted((shared / "data/imagenet_unlabelled").glob("*.JPEG"))[:4]
        x = torch.stack([torch.tensor(list(Image.open(f).convert("RGB").tobytes())).view(256, 256, 3) for f in files])
        x = x.to(torch.uint8).numpy()
    expected = nets.preprocess(name, x)
    for image, wanted in zip(x, expected, strict=True):
        torch.testing.assert_close(kinds[name](Image.fromarray(image)), wanted, rtol=0, atol=0)
