import pytest

from callbacks import DiversityTable
from lit_models.cli import main
from lit_models.metrics import Diversity, SelfBLEU
from tests.callbacks.tiny import Tiny, json_lines, trainer

FAST = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]


def test_metrics_and_table_of_sampled_sets(tmp_path, monkeypatch):
    monkeypatch.setenv("LIT_RUNS", str(tmp_path))
    (tmp_path / "more.yaml").write_text(
        "trainer:\n  max_steps: 4\n  limit_val_batches: 0\n  callbacks:\n"
        "  - class_path: callbacks.DiversityTable\n    init_args:\n      every_n_steps: 2\n      num_prompts: 10\n"
        "      num_samples: 3\n      num_rows: 2\n      metrics:\n"
        "      - {class_path: lit_models.metrics.Diversity}\n"
        "      - {class_path: lit_models.metrics.SelfBLEU}\n"
        "      - class_path: lit_models.metrics.SentenceSimilarity\n"
        "        init_args: {encoder: {class_path: lit_models.metrics.HashedNgrams}}\n"
    )
    cli = main(["fit", "--config", "ppo/tiny.yaml", "--config", str(tmp_path / "more.yaml"), *FAST])
    logged = cli.trainer.callback_metrics
    for name in ("diversity", "self_bleu", "sent_hashed_ngrams", "score"):
        assert 0 <= abs(float(logged[f"diversity/{name}"])) < 10
    (path,) = tmp_path.rglob("diversity.jsonl")
    lines = json_lines(path)
    assert [line["step"] for line in lines] == [2, 2, 4, 4]
    assert all(len(line["responses"]) == len(line["scores"]) == 3 for line in lines)


def test_a_module_that_samples_no_sets_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"callbacks\.DiversityTable needs a module with sample_sets, and Tiny has"):
        trainer(tmp_path, callbacks=[DiversityTable([Diversity()])]).fit(Tiny())


@pytest.mark.parametrize("options", [{"num_prompts": 0}, {"num_samples": 1}])
def test_arguments_out_of_range(options):
    with pytest.raises(ValueError, match=r"callbacks\.DiversityTable: num_prompts must be at least 1"):
        DiversityTable([SelfBLEU()], **options)
