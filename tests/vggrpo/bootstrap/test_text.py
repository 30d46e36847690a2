"""The text stage: its tokenizer loses nothing, its files load anywhere, and its embeddings tell what captions say."""

import json
import random
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, UMT5EncoderModel

from vggrpo.bootstrap.captions import FACTS, draw_captions
from vggrpo.bootstrap.text import TextStage, build_encoder, build_tokenizer, encode_prompts, load_text
from vggrpo.bootstrap.text_publish import FILES, publish_text
from vggrpo.bootstrap.text_train import TextRecipe, probe, start_text, train_text
from vggrpo.recipe import read_recipe

ROOT = Path(__file__).parents[3]
ASSET = ROOT / "assets/tiny-wan"
SMALL = TextRecipe(num_captions=96, num_steps=6, batch=4, width=16, layers=1, checkpoint_every=3)


@pytest.fixture(scope="module")
def captions():
    return draw_captions(range(96))


@pytest.fixture(scope="module")
def shipped():
    return load_text(ASSET)


def test_captions_are_those_of_the_rendered_clips():
    from geometry.world import make_clip

    for seed, caption in zip((3, 8), draw_captions([3, 8]), strict=True):
        clip = make_clip(seed, size=(16, 16), dynamic=seed % 2 == 1)
        assert caption.text == clip.caption
        assert caption.facts["camera"] == clip.command.motion
        assert (caption.facts["action"] == "none") == (seed % 2 == 0)
        assert set(caption.facts) == set(FACTS)


def test_known_words_are_whole_and_nothing_is_lost(captions):
    tokenizer = build_tokenizer([caption.text for caption in captions], 96)
    for caption in captions:
        ids = tokenizer(caption.text).input_ids
        assert len(ids) == len(caption.text.replace(".", " .").replace(",", " ,").split()) + 1
        assert tokenizer.decode(ids, skip_special_tokens=True) == caption.text.lower()
    strange = tokenizer("A Zebra, 3 metres away!").input_ids
    assert tokenizer.unk_token_id not in strange
    assert tokenizer.decode(strange, skip_special_tokens=True) == "a zebra, 3 metres away!"
    assert tokenizer.unk_token_id in tokenizer("語").input_ids


def test_the_tokenizer_is_the_same_in_whatever_order_captions_come(captions):
    texts = [caption.text for caption in captions]
    again = random.Random(0).sample(texts, len(texts))
    one, other = (build_tokenizer(some, 96).backend_tokenizer.to_str() for some in (texts, again))
    assert one == other
    assert one != build_tokenizer(texts[:2], 96).backend_tokenizer.to_str()


def test_a_prompt_does_not_depend_on_its_company_or_its_padding(shipped):
    prompts = ["The camera pans left slowly.", "The camera orbits clockwise fast in a room with a red floor."]
    together, mask = encode_prompts(shipped, prompts, 32)
    alone, _ = encode_prompts(shipped, prompts[:1], 24)
    assert torch.allclose(together[0, :24], alone[0], atol=1e-5)
    assert (together[~mask] == 0).all()
    assert (together[mask].abs().amax(-1) > 0).all()


def test_a_resumed_training_is_the_uninterrupted_one(captions, tmp_path):
    def run(out, stop):
        recipe = replace(SMALL, out=str(tmp_path / out))
        stage, training = start_text(recipe, captions)
        for _ in train_text(stage, training, recipe, captions):
            if training.step == stop:
                break
        return training

    whole = run("whole", 6)
    run("cut", 4)  # its last checkpoint is of step 3
    resumed = run("cut", 6)
    assert resumed.step == whole.step == 6
    for (name, one), (_, other) in zip(whole.trained(), resumed.trained(), strict=True):
        assert torch.equal(one, other), name
    assert [point["loss"] for point in resumed.curve] == [point["loss"] for point in whole.curve]
    with pytest.raises(ValueError, match=r"was made with lr 0.003 and the recipe says 0.1"):
        start_text(replace(SMALL, out=str(tmp_path / "cut"), lr=0.1), captions)


def test_a_published_stage_loads_with_transformers_alone_and_a_changed_file_is_one_line(captions, tmp_path):
    recipe = replace(SMALL, out=str(tmp_path / "run"), asset=str(tmp_path / "asset"), num_steps=1)
    stage, training = start_text(recipe, captions)
    list(train_text(stage, training, recipe, captions))
    publish_text(stage, training, recipe, "recipe.yaml", captions)
    theirs = TextStage(
        AutoTokenizer.from_pretrained(tmp_path / "asset/tokenizer", local_files_only=True),
        UMT5EncoderModel.from_pretrained(tmp_path / "asset/text_encoder", local_files_only=True).eval(),
    )
    texts = [caption.text for caption in captions[:3]]
    ours = encode_prompts(load_text(tmp_path / "asset"), texts, 40)[0]
    assert torch.equal(encode_prompts(theirs, texts, 40)[0], ours)
    assert torch.allclose(encode_prompts(stage, texts, 40)[0], ours, atol=1e-6)
    card = json.loads((tmp_path / "asset/text_encoder/card.json").read_text())
    assert card["recipe"] == asdict(recipe)
    (tmp_path / "asset/tokenizer/tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer.json has sha256 .* but card.json says"):
        load_text(tmp_path / "asset")


def test_an_impossible_recipe_is_refused_by_name(tmp_path):
    path = tmp_path / "text.yaml"
    path.write_text("width: 20")
    with pytest.raises(ValueError, match="width must be a multiple of 16, got 20"):
        read_recipe(TextRecipe, path)


def test_the_shipped_stage_tells_captions_apart_on_fresh_seeds_and_shuffled_facts_do_not(shipped):
    first = 10**8 + 10**4 * int(torch.randint(1000, ()).item())
    print(f"fresh seeds from {first}")
    training, held_out = draw_captions(range(256)), draw_captions(range(first, first + 96))
    found, control = (probe(shipped, training, held_out, shuffled) for shuffled in (False, True))
    assert found["camera"] > 0.9
    assert found["pace"] > 0.9
    assert found["direction"] > 0.6
    assert control["camera"] < 0.35
    assert control["direction"] < found["direction"] - 0.1


def test_the_shipped_stage_is_small_and_what_its_card_describes(shipped):
    card = json.loads((ASSET / "text_encoder/card.json").read_text())
    assert read_recipe(TextRecipe, ROOT / "launch/recipes/bootstrap/text.yaml") == TextRecipe(**card["recipe"])
    assert sum((ASSET / "text_encoder" / name).stat().st_size for name in FILES) < 3 * 2**20
    assert shipped.encoder.config.d_model == card["recipe"]["width"]
    assert not any(weight.requires_grad for weight in shipped.encoder.parameters())


@pytest.mark.slow
def test_the_shipped_encoder_is_better_than_an_untrained_one_again_on_fresh_seeds(shipped):
    card = json.loads((ASSET / "text_encoder/card.json").read_text())
    first = 10**8 + 10**4 * int(torch.randint(1000, ()).item())
    print(f"fresh seeds from {first}")
    training, held_out = draw_captions(range(2048)), draw_captions(range(first, first + 512))
    torch.manual_seed(0)
    untrained = TextStage(shipped.tokenizer, build_encoder(len(shipped.tokenizer), 64, 2).eval())
    found, random_one = probe(shipped, training, held_out), probe(untrained, training, held_out)
    for fact, share in found.items():  # 512 captions: a standard error of at most 2.2 points
        assert abs(share - card["held_out"]["trained"][fact]) < 0.07, fact
    assert sum(found.values()) > sum(random_one.values()) + 0.05
