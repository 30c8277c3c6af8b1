"""What a recipe may hold, and what is said of one that is wrong. About 2 s."""

import json
from itertools import pairwise
from pathlib import Path

import pytest

from orchestrator.errors import UserError
from orchestrator.recipe import load_recipe, recipe_from

HERE = Path(__file__).parent
RECIPES = sorted((HERE.parents[1] / "deploy" / "recipes").glob("*.yaml"))

DISTIL = """
name: distil
students: {model: tiny:addition-student}
teachers: {model: tiny:addition-teacher}
engine: torch
data: {type: addition}
blending: {epsilon: 0.02}
learner: {objective: {type: distillation}}
training: {num_steps: 3}
"""
REINFORCE = """
name: reinforce
students: {model: tiny:countdown-student}
data: {type: countdown}
rollouts: {group_size: 8}
learner: {objective: {type: policy_gradient}}
training: {num_steps: 3}
"""


def written(folder: Path, text: str | bytes) -> Path:
    path = folder / "recipe.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def complaint(path: Path, *overrides: str) -> str:
    """Return what is said of a recipe, one fault to a line, without the recipe's path before each."""
    with pytest.raises(UserError) as caught:
        load_recipe(path, overrides)
    return str(caught.value).replace(f"{path}: ", "")


@pytest.fixture
def distil(tmp_path: Path) -> Path:
    return written(tmp_path, DISTIL)


@pytest.fixture
def reinforce(tmp_path: Path) -> Path:
    return written(tmp_path, REINFORCE)


# ---- files that are no recipe


@pytest.mark.parametrize("text", ["", "  \n\n", "# a comment\n", "---\n", "null\n"])
def test_a_recipe_without_settings_is_empty(tmp_path: Path, text: str) -> None:
    assert complaint(written(tmp_path, text)) == "a recipe must hold settings, got an empty file"


@pytest.mark.parametrize(
    ("text", "came"), [("- a\n- b\n", "['a', 'b']"), ("hello", "'hello'"), ("3", "3"), ("2026-01-01", "'2026-01-01'")]
)
def test_a_recipe_is_a_mapping(tmp_path: Path, text: str, came: str) -> None:
    assert complaint(written(tmp_path, text)) == f"a recipe must be a section of settings, got {came}"


@pytest.mark.parametrize("content", [b"\x00\xff\xfe\x80", DISTIL.encode("utf-16"), b"name: caf\xe9"])
def test_a_recipe_is_utf8_text(tmp_path: Path, content: bytes) -> None:
    assert complaint(written(tmp_path, content)) == "a recipe must be UTF-8 text, got bytes that are not"


@pytest.mark.parametrize(("name", "came"), [("", "Is a directory"), ("missing.yaml", "No such file or directory")])
def test_a_recipe_is_a_readable_file(tmp_path: Path, name: str, came: str) -> None:
    assert complaint(tmp_path / name) == f"a recipe must be a readable file, got: {came}"


@pytest.mark.parametrize("text", ["!!python/object/apply:os.system ['touch {}']", "? !!python/name:os.system\n: 1",
                                  DISTIL + "seed: !!python/object/apply:os.system ['touch {}']"])  # fmt: skip
def test_yaml_that_would_run_code_is_refused_and_does_not_run(tmp_path: Path, text: str) -> None:
    victim = tmp_path / "victim"
    assert "a tag (`!...`), which plain data has none of" in complaint(
        written(tmp_path, text.replace("{}", str(victim)))
    )
    assert not victim.exists()


@pytest.mark.parametrize(
    ("text", "came"),
    [
        (DISTIL + "name: again\n", "got in line 10: 'name' is given twice"),
        ("data: {type: addition, type: countdown}", "got in line 1: 'type' is given twice"),
        (DISTIL + "graders:\n", "got in line 10: 'graders' has no value; write null for none"),
        (DISTIL + "graders:\n  # num_actors: 2\n", "'graders' has no value; write null for none"),
        (DISTIL + "1: 2\n", "got in line 10: a key must be a word, got 1"),
        ("? [a]\n: 1\n", "a key must be a word, got more"),
        ("a:\n\tb: 1\n", "got in line 2: found character '\\t' that cannot start any token"),
        ("a: [1, 2\n", "got in line 2: expected ',' or ']', but got '<stream end>'"),
        ("a: *b\n", "got in line 1: found undefined alias 'b'"),
        ("a: 1\n---\nb: 2\n", "got in line 2: but found another document"),
        ("teachers: {<<: 3}\n", "expected a mapping or list of mappings for merging, but found scalar"),
        ("a: \x00", "unacceptable character #x0000"),
        ("seed: " + "9" * 5000, "Exceeds the limit (4300 digits)"),
        ("[" * 5000, "nested too deeply"),
        ("{a: " * 5000, "nested too deeply"),
    ],
)  # fmt: skip
def test_broken_yaml_is_refused_by_its_line(tmp_path: Path, text: str, came: str) -> None:
    said = complaint(written(tmp_path, text))
    assert said.startswith("plain YAML is required, got")
    assert came in said
    assert len(said) < 250


def test_an_alias_that_unfolds_to_a_billion_values_costs_nothing(tmp_path: Path) -> None:
    lines = ["a: &a [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"{name}: &{name} [{', '.join(['*' + before] * 10)}]" for before, name in pairwise("abcdefghi")]
    said = complaint(written(tmp_path, "\n".join([*lines, "seed: *i"])))
    assert "seed must be a whole number, got [[" in said
    assert max(map(len, said.splitlines())) < 400


# ---- what YAML means


def test_anchors_and_merge_keys_work_and_the_nearer_value_wins(tmp_path: Path) -> None:
    text = DISTIL.replace("students: {model: tiny:addition-student}", "students: &pool\n  model: a\n  num_cpus: 0.25")
    text = text.replace("teachers: {model: tiny:addition-teacher}", "teachers:\n  <<: *pool\n  model: b")
    recipe = load_recipe(written(tmp_path, text))
    assert recipe.teachers is not None
    assert (recipe.students.model, recipe.teachers.model, recipe.teachers.num_cpus) == ("a", "b", 0.25)


def test_an_override_of_a_merged_section_leaves_the_other_as_it_was(tmp_path: Path) -> None:
    text = DISTIL.replace("students: {model: tiny:addition-student}", "students: &pool {model: a}")
    text = text.replace("teachers: {model: tiny:addition-teacher}", "teachers: *pool")
    recipe = load_recipe(written(tmp_path, text), ["students.model=b"])
    assert recipe.teachers is not None
    assert (recipe.students.model, recipe.teachers.model) == ("b", "a")


@pytest.mark.parametrize(("text", "value"), [("1e-5", 1e-5), ("1E-5", 1e-5), ("+1e5", 1e5), (".5", 0.5), ("1.", 1.0),
                                             ("2", 2.0), ("1.5e+3", 1500.0)])  # fmt: skip
def test_every_usual_spelling_of_a_number_is_one(distil: Path, text: str, value: float) -> None:
    rate = load_recipe(distil, [f"learner.learning_rate={text}"]).learner.learning_rate
    assert rate == value
    assert isinstance(rate, float)


@pytest.mark.parametrize(
    "text", ["0x10", "010", "0o10", "0b11", "1:30", "1_000", "08", "2026-01-01", "yes", "--3", "=3"]
)
def test_what_some_yaml_reads_as_another_number_is_no_number(distil: Path, text: str) -> None:
    assert complaint(distil, f"seed={text}") == f"seed must be a whole number, got {text!r}"


@pytest.mark.parametrize("text", ["on", "no", "Y", "2026-01-01"])
def test_a_word_stays_a_word(distil: Path, text: str) -> None:
    assert load_recipe(distil, [f"name={text}"]).name == text


# ---- settings that are wrong


@pytest.mark.parametrize(
    ("override", "said"),
    [
        # wrong types
        ("seed=abc", " must be a whole number, got 'abc'"),
        ('seed="1"', " must be a whole number, got '1'"),
        ("seed=true", " must be a whole number, got true"),
        ("seed=1.0", " must be a whole number, got 1.0"),
        ("seed=1e3", " must be a whole number, got 1000.0"),
        ("seed=null", " must be a whole number, got null"),
        ("name=3", " must be a string, got 3"),
        ("name=true", " must be a string, got true"),
        ("students.num_cpus='1'", " must be a number, got '1'"),
        ("students.num_actors=true", " must be a whole number, got true"),
        ("cluster.dashboard=1", " must be true or false, got 1"),
        ("cluster.dashboard=yes", " must be true or false, got 'yes'"),
        ("evaluation.pass_at=8", " must be a list, got 8"),
        ("evaluation.pass_at=[1, true]", ".1 must be a whole number, got true"),
        ("learner.adam_betas=[0.9]", ".1 is required and missing"),
        ("learner.adam_betas=[0.9, 0.9, 0.9]", " must be a list of 2, got [0.9, 0.9, 0.9]"),
        ("learner.zero_stage=true", " must be 1 or 2 or 3, got true"),
        ("learner.zero_stage='1'", " must be 1 or 2 or 3, got '1'"),
        ("rollouts.support_size=true", " must be a whole number or full, got true"),
        ("rollouts.support_size=ful", " must be a whole number or full, got 'ful' (did you mean full?)"),
        ("learner.objective.support_size=1.5", " must be a whole number, got 1.5"),
        # sections that are none
        ("students=null", " must be a section of settings, got null"),
        ("rollouts=3", " must be a section of settings, got 3"),
        ("data=addition", " must be a section of settings, got 'addition'"),
        ("learner.objective=[]", " must be a section of settings, got []"),
        ("engine=3", " must be a section of settings, got 3"),
        # out of range
        ("learner.learning_rate=.nan", " must be a finite number, got nan"),
        ("learner.learning_rate=-.inf", " must be a finite number, got -inf"),
        ("learner.learning_rate=1e400", " must be a finite number, got inf"),
        ("learner.learning_rate=0", " must be above 0, got 0"),
        ("learner.adam_betas=[.nan, 0.9]", ".0 must be a finite number, got nan"),
        ("learner.adam_betas=[0.9, 1]", " must lie in [0, 1), got [0.9, 1.0]"),
        ("blending.epsilon=-0.1", " must be at least 0, got -0.1"),
        ("blending.draft_length=65", " must be at most 64 or adaptive or measured, got 65"),
        ("rollouts.support_size=-1", " must be at least 0 or full, got -1"),
        ("learner.objective.jsd_beta=1", " must be below 1, got 1"),
        ("learner.objective.divergence=kl", " must be reverse_kl or forward_kl or jsd, got 'kl'"),
        ("students.num_gpus=1.5", " must be a fraction of at most 3 digits or a whole number, got 1.5"),
        ("training.num_steps=0", " must be at least 1, got 0"),
        ("seed=-" + "9" * 30, " must be at least 0, got -" + "9" * 30),
        ("name=../x", " must be of the form ^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$, got '../x'"),
        # unknown words
        ("data.type=adition", " must be addition or countdown or file, got 'adition' (did you mean addition?)"),
        ("data.type=3", " must be addition or countdown or file, got 3"),
        ("data={max_digits: 3}", ".type is required and missing; it is addition or countdown or file"),
        ("engine=vlm", ".type must be torch or vllm, got 'vlm' (did you mean vllm?)"),
        ("blending.schedule=lin", " must be linear or constant, got 'lin' (did you mean linear?)"),
        ("learner.zero_stage=4", " must be 1 or 2 or 3, got 4"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_refused_with_its_path_what_is_required_and_what_came(
    distil: Path, override: str, said: str
) -> None:
    assert complaint(distil, override) == override.partition("=")[0] + said


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("seeed=1", " is not a setting (did you mean seed?); a recipe has blending, checkpoints, "),
        ("students.modl=x", " is not a setting (did you mean model?); students has model, num_actors, "),
        ("engine={type: vllm, thread: 1}", ".thread is not a setting (did you mean threads?); engine has dtype, "),
        ("data.max_digit=1", " is not a setting (did you mean max_digits?); data has max_digits, type"),
        ("data={type: file, path: x, task: math, file: 3}", ".file is not a setting; data has held_out_path, path, "),
        ("learner.objective.clip_low=0.1", " is not a setting; learner.objective has divergence, jsd_beta, "),
    ],
)  # fmt: skip
def test_an_unknown_setting_is_refused_with_what_was_probably_meant(distil: Path, override: str, said: str) -> None:
    assert complaint(distil, override).startswith(override.partition("=")[0] + said)


def test_a_recipe_of_many_faults_names_each_on_a_line(distil: Path) -> None:
    said = complaint(distil, "seed=x", "students.modl=x", "rollouts.support_size=-1", "data={type: file}")
    assert [line.split(" ", 1)[0] for line in said.splitlines()] == [
        "seed", "students.modl", "data.path", "data.task", "rollouts.support_size",
    ]  # fmt: skip


def test_a_huge_value_is_cut_in_the_message(distil: Path) -> None:
    assert len(complaint(distil, f"seed={'x' * 100_000}")) < 150


# ---- settings that do not go together


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("teachers=null", "teachers.model must name a teacher, since learner.objective distils one; got none"),
        ("learner.objective.type=policy_gradient blending=null", "teachers must be left out, since nothing uses it"),
        ("rollouts.prompts_per_step=7", "rollouts.prompts_per_step x rollouts.group_size (7) must be a multiple of "),
        ("learner.world_size=3", "must be a multiple of learner.world_size x learner.micro_batch_size (3 x 8 = 24)"),
        ("rollouts.temperature=0.5", "temperature must be 1.0 where a teacher is distilled, got 0.5"),
        ("rollouts.top_p=0.9", "rollouts.top_p must be left out while two models are blended, got 0.9: where the "),
        ("rollouts.top_k=5", "rollouts.top_k must be left out while two models are blended, got 5: where the "),
        ('blending={"type":"skd"}', "rollouts.support_size must be full when blending.type is skd, since"),
        ("engine=vllm blending.layout=one_engine blending.draft_length=measured", "must be a number or adaptive when "),
        ("blending.num_gpus=1", "blending.num_gpus must be 0, got 1"),
        ("rollouts.support_size=8", "support_size must be at least learner.objective.support_size (16), got 8"),
        ("engine=vllm learner.objective.signal=full", "support_size must be full where the teacher's signal is full"),
        ("learner.objective.support=union learner.objective.support_size=32", "must be at least learner.objective.sup"),
        ("learner.objective.signal=sampled learner.objective.divergence=jsd", "objective.signal must be support, full"),
        ("learner.objective.signal=sampled learner.objective.veto={}", "objective.signal must be support, full or hi"),
        ("rollouts.support_size=0 learner.objective.signal=hidden", "must be at least 1 while two models are blended"),
        ("engine=vllm learner.objective.signal=hidden", "engine must be torch where the teacher's signal is more"),
        ("engine=vllm learner.objective.support=teacher", "log-probs at the student's ids (support teacher), got vllm"),
        ("rollouts.dynamic_sampling={}", "rollouts.dynamic_sampling must be left out, since learner.objective.type is"),
        ("blending=null rollouts.support_size=8", "must be at least learner.objective.support_size (16), got 8"),
        ("evaluation.num_samples=4", "evaluation.pass_at must lie between 1 and evaluation.num_samples (4), got 8"),
        ("evaluation.pass_at=[]", "evaluation.pass_at must hold at least one k, got none"),
        ("learner.zero_stage=0", "learner.zero_stage must be 1 or 2 or 3, got 0: without ZeRO, DeepSpeed reports no "),
    ],
)  # fmt: skip
def test_settings_of_a_distillation_that_do_not_go_together_are_refused(distil: Path, override: str, said: str) -> None:
    assert said in complaint(distil, *override.split(" "))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("rollouts.group_size=1", "rollouts.group_size must be at least 2, since learner.objective.method is grpo"),
        ("blending.epsilon=0.1", "teachers.model must name a teacher, since there is a blending section; got none"),
        ("learner.objective.reward_correct=-1.0", "objective.reward_correct must be above reward_wrong = 0.0, "),
        ("learner.objective.support_size=1", "objective.support_size is not a setting; learner.objective has "),
        ("learner.objective.method=gro", "learner.objective.method must be grpo or dr_grpo or dapo or cispo or "),
        ("learner.objective.distillation={}", "teachers.model must name a teacher, since learner.objective.distil"),
        ("learner.objective.correction={low: 3}", "correction.low must be below high = 2.0, got 3.0"),
        ("learner.objective={type: policy_gradient, aggregation: token_mean, aggregation_tokens: 9}",
         "learner.objective.aggregation_tokens must be left out with aggregation token_mean"),
    ],
)  # fmt: skip
def test_settings_of_reinforcement_that_do_not_go_together_are_refused(
    reinforce: Path, override: str, said: str
) -> None:
    assert said in complaint(reinforce, override)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ("jsd_beta=0.3", "objective.jsd_beta must be left out, since the divergence is reverse_kl; got 0.3"),
        ("divergence=jsd teacher_logprob_floor=-9", "teacher_logprob_floor must be left out, since the divergence is"),
        ("signal=hidden tail=true", "objective.tail must be left out, since the signal is hidden and not a support"),
        ("signal=full support=teacher", "objective.support must be left out, since the signal is full"),
        ("signal=sampled support_size=4", "objective.support_size must be left out, since the signal is sampled"),
        ("sft_warmup_steps=3", "objective.sft_warmup_steps must be below training.num_steps (3), got 3"),
    ],
)
def test_settings_of_a_distillation_without_effect_are_refused(distil: Path, overrides: str, said: str) -> None:
    assert said in complaint(distil, *(f"learner.objective.{override}" for override in overrides.split(" ")))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ("aggregation_tokens=5", "aggregation_tokens must be left out, since tokens are aggregated by token_mean"),
        ("method=reinforce; clip_low=0.1", "clip_low must be left out, since the surrogate reinforce clips nothing"),
        (
            "correction={}; clip_high=0.1",
            "clip_high must be left out, since with a correction the surrogate's ratio is 1",
        ),
        ("correction={low: 0.5}", "correction.low must be left out, since the correction truncates from above only"),
        ("method=rloo; std_ddof=0", "std_ddof must be left out, since the advantage rloo does not ask for it"),
        ("method=maxrl; ds_coef=0.1", "ds_coef must be left out, since the advantage is maxrl; got 0.1"),
        ("focal_while_blending='on'", "focal_while_blending must be left out, since nothing is blended; got on"),
        ("distillation_coef=2.0", "distillation_coef must be left out, since there is no distillation section; got 2"),
        ("overlong={buffer_tokens: 200}", "overlong.buffer_tokens must be at most rollouts.max_new_tokens (128)"),
    ],
)
def test_settings_of_a_method_without_effect_are_refused(reinforce: Path, overrides: str, said: str) -> None:
    assert said in complaint(reinforce, *(f"learner.objective.{override}" for override in overrides.split("; ")))


@pytest.mark.parametrize("method", ["reinforce", "ds_grpo"])
def test_what_learns_from_equal_rewards_is_not_sampled_dynamically(reinforce: Path, method: str) -> None:
    said = complaint(reinforce, "rollouts.dynamic_sampling={}", f"learner.objective.method={method}")
    assert said.startswith(f"rollouts.dynamic_sampling must be left out with the advantage {method}, which learns from")


def test_an_estimate_by_the_sampled_token_needs_the_whole_law(distil: Path) -> None:
    said = complaint(distil, "blending=null", "learner.objective.signal=sampled", "rollouts.top_p=0.9")
    assert said.startswith("rollouts.top_p must be left out where the teacher's signal is sampled, got 0.9")


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_a_resolved_recipe_with_every_default_written_out_is_accepted(recipe: Path) -> None:
    resolved = load_recipe(recipe)
    assert recipe_from(resolved.model_dump(mode="json"), "resolved") == resolved


def test_reinforce_compares_nothing_and_so_needs_no_group(reinforce: Path) -> None:
    method = "learner.objective.method=reinforce"
    assert load_recipe(reinforce, ["rollouts.group_size=1", method]).rollouts.group_size == 1
    said = complaint(reinforce, "rollouts.group_size=1", method, "rollouts.dynamic_sampling={}")
    assert said.startswith("rollouts.group_size must be at least 2 where rollouts.dynamic_sampling asks")


# ---- overrides


@pytest.mark.parametrize("override", ["foo", "=3", ".=3", "a..b=3", ".a=3"])
def test_an_override_without_a_setting_is_refused(distil: Path, override: str) -> None:
    assert complaint(distil, override) == f"an override must be section.key=value, got {override!r}"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("name.x=3", "name.x: name is a value, not a section, so nothing in it can be set"),
        ("students.model.x=3", "students.model.x: model is a value, not a section, so nothing in it can be set"),
        ("seed=", "an override must be section.key=value, got 'seed=' without a value; write null for none"),
        ("seed=[", "seed: plain YAML is required, got in line 1: expected the node content, but found '<stream end>'"),
        ("seed.x=3", "seed must be a whole number, got {'x': 3}"),
        ("nosuch.key=3", "nosuch is not a setting; a recipe has "),
        ("graders.x.y=3", "graders.x is not a setting; graders has deadline_s, "),
    ],
)  # fmt: skip
def test_an_override_that_cannot_be_applied_is_refused(distil: Path, override: str, said: str) -> None:
    assert complaint(distil, override).startswith(said)


def test_overrides_set_values_of_every_kind_in_sections_that_are_there_or_not(distil: Path) -> None:
    recipe = load_recipe(distil, [
        "seed=3", "students.num_actors=2", "rollouts.support_size=full", "cluster.dashboard=false",
        "teachers.num_cpus=1", "evaluation.pass_at=[1, 4]", "cluster.address=127.0.0.1:6379", "blending=null", "seed=4",
    ])  # fmt: skip
    assert recipe.teachers is not None
    assert (recipe.seed, recipe.students.num_actors, recipe.rollouts.support_size) == (4, 2, "full")
    assert (recipe.cluster.dashboard, recipe.cluster.address) == (False, "127.0.0.1:6379")
    assert (recipe.teachers.num_cpus, recipe.evaluation.pass_at, recipe.blending) == (1.0, (1, 4), None)


@pytest.mark.parametrize("overrides", [["engine=vllm"], ["engine.type=vllm"], ["engine={type: vllm}"]])
def test_an_engine_is_chosen_by_its_name_or_its_type(distil: Path, overrides: list[str]) -> None:
    assert load_recipe(distil, overrides).engine.type == "vllm"


def test_a_named_engine_takes_settings_of_its_own(distil: Path) -> None:
    engine = load_recipe(distil, ["engine=vllm", "engine.memory_gib=0.5"]).engine
    assert engine.model_dump() | {"memory_gib": 0.5, "type": "vllm"} == engine.model_dump()


# ---- recipes that are right


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_that_is_shipped_loads_and_survives_json(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path)
    resolved = json.dumps(recipe.model_dump(mode="json"))
    assert recipe_from(json.loads(resolved), "recipe.json") == recipe
    assert load_recipe(written(tmp_path, resolved)) == recipe


def test_a_recipe_to_start_with_is_shipped() -> None:
    assert "quickstart" in [path.stem for path in RECIPES]


def test_a_recipe_cannot_be_changed_once_read(distil: Path) -> None:
    recipe = load_recipe(distil)
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 3
