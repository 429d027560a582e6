"""lm-eval's `local-completions` against the server; pip install "lm-eval[api]" to run it."""

import pytest
import torch
import transformers

from research.convert import load_directory
from research.inference.engine import Engine, EngineConfig
from research.inference.server import ServedTokenizer
from tests.research.inference.server.fake import serving
from tests.research.inference.server.test_openai import greedy, write_model

PAIRS = [("the cat", " sat on"), ("naïve", " café"), ("on the mat", " the")]


@pytest.mark.slow
def test_log_likelihoods_and_texts_are_those_of_transformers(tmp_path):
    api = pytest.importorskip("lm_eval.models.openai_completions", exc_type=ImportError)
    from lm_eval.api.instance import Instance

    write_model(tmp_path)
    tokenizer = ServedTokenizer(tmp_path)
    config = EngineConfig(slots=4, max_length=96, chunk=16, queue=16)
    engine = Engine(load_directory(tmp_path), config, tokenizer=tokenizer.plain)
    engine.warm_up()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    encoder = transformers.AutoTokenizer.from_pretrained(tmp_path)
    with serving(engine, tokenizer) as server:
        harness = api.LocalCompletionsAPI(
            base_url=f"{server.address}/v1/completions",
            model="small",
            tokenizer=str(tmp_path),
            tokenizer_backend="huggingface",
            max_length=95,
            batch_size=2,
        )

        def instances(kind, arguments):
            return [
                Instance(kind, {}, pair, index, metadata=("task", index, 1))
                for index, pair in enumerate(arguments)
            ]

        got = harness.loglikelihood(instances("loglikelihood", PAIRS))
        for (context, continuation), (logprob, is_greedy) in zip(PAIRS, got, strict=True):
            begin = encoder.encode(context, add_special_tokens=False)
            whole = encoder.encode(context + continuation, add_special_tokens=False)
            with torch.no_grad():
                logits_tv = theirs(torch.tensor([whole])).logits[0].log_softmax(-1)
            places = range(len(begin) - 1, len(whole) - 1)
            want = sum(logits_tv[i, whole[i + 1]].item() for i in places)
            assert logprob == pytest.approx(want, abs=1e-3)
            assert is_greedy == all(logits_tv[i].argmax() == whole[i + 1] for i in places)
        settings = {"until": ["\n\n"], "max_gen_toks": 8, "temperature": 0}
        texts = harness.generate_until(instances("generate_until", [("the cat", settings)]))
        new, _ = greedy(theirs, encoder.encode("the cat", add_special_tokens=False), 8)
        assert texts == [encoder.decode(new, skip_special_tokens=True).split("\n\n")[0]]
