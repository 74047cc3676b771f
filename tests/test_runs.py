"""Whole runs of the three scripts, as a user starts them: tiny models, seconds each."""

import csv
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
import tyro
from conftest import ROOT, SHARED

import eval_sr
import ppo_ldm_sr as orl
import pretrain_ldm
import sr_inputs

SMALL = ["--num-envs", "4", "--num-steps", "25", "--crop", "64", "--eval-images", "2", "--max-calls", "4", "--base-steps", "4", "--initial-policy", "plain"]


def run(*command, code=0, timeout=280, **environment):
    """Runs a script of the project and returns what it said."""
    env = {"OMP_NUM_THREADS": "2", **os.environ, **environment}
    done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + (done.stderr if code else "")


def refused(capsys, script, *flags):
    """What a script says, called in this process with flags that must end it with one sentence and exit code 2."""
    with pytest.raises(SystemExit) as error:
        script.main(tyro.cli(script.Args, args=[str(flag) for flag in flags]))
    said = capsys.readouterr().out
    assert error.value.code == 2 and said.count("error: ") == 1, said
    return said


@pytest.fixture(scope="module")
def trained(tmp_path_factory, ldm_folder):
    """200 steps on the synthetic scenes that ship."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    said = run("ppo_ldm_sr.py", "--ldm", ldm_folder, "--dataset", "runs/scenes", "--run-dir", folder, "--total-timesteps", 200, *SMALL)
    return folder, said


def test_a_run_on_synthetic_scenes_writes_events_checkpoint_and_table(trained):
    folder, said = trained
    assert "synthetic scenes" in said and "LDM with RL" in said
    for name in ("checkpoint.safetensors", "agent.safetensors", "state.json", "constant.json", "table.md", "table.csv", "figure.png", "reward.png"):
        assert (folder / name).stat().st_size > 0, name
    assert "synthetic scenes" in (folder / "table.md").read_text().splitlines()[0]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {"charts/episodic_return", "charts/SPS", "losses/approx_kl", "losses/explained_variance", "reward/psnr",
            "reward/efficiency", "eval/psnr_agent", "eval/psnr_plain", "policy/blend_call_01"} <= tags  # fmt: skip
    assert [e.step for e in events.Scalars("charts/SPS")] == [100, 200]


def test_the_csv_has_the_promised_columns_methods_and_one_line_per_image_and_method(trained):
    with open(trained[0] / "table.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["scene", "image", "method", "psnr", "ssim", "lpips", "calls", "seconds", "lr_psnr"]
    assert {r["method"] for r in rows} == set(eval_sr.METHODS) == {"bicubic", "ldm", "ldm_same_calls", "constant", "agent", "autoencoder"}
    assert len(rows) == 6 * 8  # one image a scene
    assert all(r["calls"] == "100" for r in rows if r["method"] == "ldm")
    pairs = {(r["scene"], r["image"]): r["calls"] for r in rows if r["method"] == "agent"}
    assert all(pairs[r["scene"], r["image"]] == r["calls"] for r in rows if r["method"] == "ldm_same_calls")


def assert_same(a, b):
    one, two = (sr_inputs.load_tensors(folder / "checkpoint.safetensors")[0] for folder in (a, b))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[k], two[k]) for k in one)


PATCHED = """
import sys, time, torch, ppo_ldm_sr as orl, sr_inputs
save = sr_inputs.save_run
def after_the_first(run, agent, optimizer, env, generators, state, rank):
    save(run, agent, optimizer, env, generators, state, rank)
    if state["iteration"] == 1:
        ACTION
sr_inputs.save_run = after_the_first
sr_inputs.subprocess.run = lambda *rest, **more: sys.exit(0)  # no table
orl.main(sr_inputs.parse_args(orl.Args, ""))
"""


def train_with(action, folder, *flags, code=0):
    """A run that does `action` after its first checkpoint, and makes no table."""
    return run("-c", PATCHED.replace("ACTION", action), "--run-dir", folder, "--total-timesteps", 200, *SMALL, *flags, code=code)


def test_a_run_starts_at_the_best_constant_action_and_keeps_it(tmp_path, ldm_folder):
    folder = tmp_path / "run"
    said = run("-c", PATCHED.replace("ACTION", "pass"), "--run-dir", folder, "--total-timesteps", 100, *SMALL[:-2], "--learning-rate", 0,
               "--ldm", ldm_folder, "--dataset", "runs/scenes")  # fmt: skip
    kept = json.loads((folder / "constant.json").read_text())
    assert f"best constant action: reward {kept['reward_on_training_images']:.4f}" in said
    tensors, _ = sr_inputs.load_tensors(folder / "agent.safetensors")
    assert tensors["actor.head.4.bias"].tolist() == kept["action"] and any(kept["action"])


def test_stop_and_resume_is_bit_for_bit_the_run_that_never_stopped(trained, tmp_path, ldm_folder):
    """Also: the same seed, in another process, gives the same weights."""
    folder, flags = tmp_path / "stopped", ("--ldm", ldm_folder, "--dataset", "runs/scenes")
    said = train_with("raise KeyboardInterrupt", folder, *flags, code=130)
    assert f"--resume {folder}" in said
    assert json.loads((folder / "state.json").read_text())["step"] == 100
    said = run("-c", PATCHED.replace("ACTION", "pass"), "--resume", folder)
    assert "step 100 of 200" in said
    assert_same(trained[0], folder)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    assert [e.step for e in events.Scalars("charts/SPS")] == [100, 200]  # one curve


def test_what_would_change_a_resumed_run_is_refused_by_name(trained, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(trained[0], folder)
    assert "--gamma would change the method" in refused(capsys, orl, "--resume", folder, "--gamma", "0.5")
    file = folder / "checkpoint.safetensors"
    tensors, state = sr_inputs.load_tensors(file)
    sr_inputs.save_tensors(file, tensors, state | {"ldm": "0" * 12})
    assert "no longer the LDM" in refused(capsys, orl, "--resume", folder)
    del state["args"]["gamma"]
    sr_inputs.save_tensors(file, tensors, state)
    assert "another version of this code" in refused(capsys, orl, "--resume", folder)
    file.write_bytes(file.read_bytes()[:2000])
    assert "damaged" in refused(capsys, orl, "--resume", folder)
    assert "holds no checkpoint" in refused(capsys, orl, "--resume", tmp_path)


def test_nan_from_the_ldm_stops_the_run_and_leaves_the_last_good_checkpoint(tmp_path, ldm_folder):
    folder = tmp_path / "nan"
    spoil = "next(env.mdp.ldm.unet.parameters()).data.fill_(float('inf'))"
    said = train_with(spoil, folder, "--ldm", ldm_folder, "--dataset", "runs/scenes", code=2)
    assert "NaN or infinity at step 1" in said and str(folder) in said  # within the second iteration
    tensors, state = sr_inputs.load_tensors(folder / "checkpoint.safetensors")
    assert state["step"] == 100 and all(v.isfinite().all() for k, v in tensors.items() if k.startswith(("agent", "env")))


def test_a_folder_that_cannot_be_written_is_named(tmp_path, ldm_folder, trained, capsys):
    (tmp_path / "file").write_text("not a folder")
    flags = ("--ldm", ldm_folder, "--dataset", "runs/scenes", "--total-timesteps", "200", *SMALL)
    assert "cannot be written" in refused(capsys, orl, "--run-dir", tmp_path / "file/run", *flags)
    photo, output = "runs/scenes/test/river", tmp_path / "file/out"
    said = refused(capsys, eval_sr, "--agent", trained[0], "--images", photo, "--output", output)
    assert "cannot be written" in said and "--output" in said


def test_bad_settings_end_in_one_sentence_before_anything_is_written(trained, tmp_path, ldm_folder, capsys):
    folder = tmp_path / "never"
    for flags, words in (
        (["--total-timesteps", "0"], "--total-timesteps 0"),
        (["--crop", "30", "--dataset", "runs/scenes"], "--crop 30"),
        (["--minibatch-size", "2000"], "--minibatch-size 2000"),
        (["--base-steps", "0"], "at least 1"),
        (["--device", "tpu"], "--device tpu"),
        (["--dataset", "nowhere/to/be/found"], "no such folder"),
        (["--dataset", "runs/scenes", "--scenes", "volcano"], "has no volcano"),
        (["--ldm", "runs/nothing"], "no such folder"),
        (["--run-dir", trained[0]], "the folder exists"),
    ):
        assert words in refused(capsys, orl, "--ldm", ldm_folder, "--run-dir", folder, *flags)
        assert not folder.exists()


def test_two_processes_keep_equal_weights_on_different_images(tmp_path, ldm_folder):
    script = tmp_path / "check.py"
    script.write_text(
        "import sys, os, torch; sys.path.insert(0, os.getcwd())\n"
        "import ppo_ldm_sr as orl, sr_inputs\n"
        "update = orl.update\n"
        "def checked(agent, optimizer, batch, args, generator):\n"
        "    out = update(agent, optimizer, batch, args, generator)\n"
        "    for value, same in ((torch.cat([p.detach().flatten() for p in agent.parameters()]), True), (batch['maps'].float().flatten(), False)):\n"
        "        parts = [torch.empty_like(value) for _ in range(2)]\n"
        "        orl.dist.all_gather(parts, value)\n"
        "        assert torch.equal(*parts) == same\n"
        "    if orl.dist.get_rank() == 0: print('checked', batch['maps'].shape[1])\n"
        "    return out\n"
        "orl.update = checked\n"
        "sr_inputs.subprocess.run = lambda *rest, **more: sys.exit(0)  # no table\n"
        "orl.main(sr_inputs.parse_args(orl.Args, 'two processes'))\n"
    )
    folder = tmp_path / "two"
    said = run("-m", "torch.distributed.run", "--nproc_per_node=2", script, "--ldm", ldm_folder, "--dataset", "runs/scenes",
               "--run-dir", folder, "--total-timesteps", 200, *SMALL, OMP_NUM_THREADS="1")  # fmt: skip
    assert said.count("checked 2") == 2 and said.count("device: ") == 1  # two slots a process, one voice
    assert json.loads((folder / "state.json").read_text())["step"] == 200
    assert len(list(folder.glob("events.*"))) == 1


def test_a_process_that_dies_ends_the_run_with_its_message(tmp_path, ldm_folder):
    script = tmp_path / "dies.py"
    script.write_text(PATCHED.replace("ACTION", "raise MemoryError('out of memory, as if') if rank else time.sleep(0)"))
    said = run("-m", "torch.distributed.run", "--nproc_per_node=2", script, "--ldm", ldm_folder, "--dataset", "runs/scenes",
               "--run-dir", tmp_path / "run", "--total-timesteps", 200, *SMALL, code=1, OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))  # fmt: skip
    assert "MemoryError: out of memory, as if" in said


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_cuda_a_run_trains_end_to_end_and_its_table_says_so(tmp_path):
    said = run("ppo_ldm_sr.py", "--dataset", "runs/scenes", "--run-dir", tmp_path / "cuda", "--total-timesteps", 2000, "--eval-images", 8)
    assert torch.cuda.get_device_name() in said and "LDM with RL" in said
    run("ppo_ldm_sr.py", "--resume", tmp_path / "cuda", "--total-timesteps", 3000, "--device", "cuda")


@pytest.mark.skipif(not (ROOT / "runs/orl_ldm/agent.safetensors").is_file(), reason="no trained agent in runs/orl_ldm yet")
def test_the_shipped_agent_super_resolves_a_photo(tmp_path):
    photo = next((ROOT / "runs/scenes/test/river").glob("*.jpg"))
    said = run("eval_sr.py", "--images", photo, "--output", tmp_path)
    assert "256 x 256 -> 1024 x 1024" in said and (tmp_path / f"{photo.stem}_sr.png").stat().st_size > 10_000


@pytest.mark.skipif(not (ROOT / "runs/orl_ldm/agent.safetensors").is_file(), reason="no trained agent in runs/orl_ldm yet")
def test_the_shipped_agent_keeps_its_gain_over_the_plain_ldm(tmp_path):
    """Two test images a scene: real ones where they are (the agent was trained on their like), else synthetic scenes."""
    real = (SHARED / "data/paper8").is_dir()
    images = ("--dataset", SHARED / "data/paper8", "--crop", 128) if real else ("--dataset", "runs/scenes", "--crop", 128)
    run("eval_sr.py", *images, "--limit", 2, "--output", tmp_path)
    with open(tmp_path / "table.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    mean = {m: {k: sum(float(r[k]) for r in rows if r["method"] == m) / 16 for k in ("psnr", "ssim", "lpips", "calls")} for m in eval_sr.METHODS if m != "constant"}
    agent, plain, same = mean["agent"], mean["ldm"], mean["ldm_same_calls"]
    assert agent["psnr"] > plain["psnr"] + 0.8 and agent["ssim"] > plain["ssim"] + 0.02 and agent["calls"] <= 10
    assert agent["lpips"] < mean["bicubic"]["lpips"] - 0.1
    if real and any(float(r["lpips"]) == float(r["lpips"]) for r in rows):
        assert agent["lpips"] < same["lpips"] - 0.02  # for the same number of calls


def test_pretraining_writes_an_ldm_that_loads_and_goes_on_where_it_stopped(tmp_path):
    folder = tmp_path / "ldm"
    flags = ["--dataset", "runs/scenes", "--output", folder, "--crop", "64", "--batch-unet", "8", "--report-images", "2"]
    said = run("pretrain_ldm.py", *flags, "--minutes-autoencoder", "0.03", "--minutes-unet", "0.03")
    assert "plain DDIM, 100 step(s)" in said and "PCA of 4 x 4 patches, 8 channels" in said
    first = json.loads((folder / "training.json").read_text())
    said = run("pretrain_ldm.py", *flags, "--minutes-autoencoder", "0", "--minutes-unet", "0.03", code=2)
    assert "holds a model; go on with --resume" in said
    run("pretrain_ldm.py", *flags, "--resume", "--minutes-autoencoder", "0", "--minutes-unet", "0.03")
    second = json.loads((folder / "training.json").read_text())
    assert second["autoencoder"] == first["autoencoder"] > 0 and second["unet"] > first["unet"] > 0
    assert orl.load_ldm(str(folder), torch.device("cpu")).latent_channels == 8


def test_the_readme_explains_every_logged_metric(trained):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(trained[0]))
    events.Reload()
    text = (ROOT / "README.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    for tag in events.Tags()["scalars"]:
        group, name = tag.split("/")
        plain = re.sub(r"_(agent|plain|constant)$|_call_\d+$|_\d+$", "", name)
        row = [r for r in rows if r.startswith(f"| `{group}/") and (plain in r or "{component}" in r and plain in orl.COMPONENTS)]
        assert row, f"README.md explains no {tag}"


def test_the_readme_lists_every_choice_that_the_code_marks():
    text = (ROOT / "README.md").read_text()
    listed = text[text.index("## What the paper leaves open") :].split("\n## ")[0]
    choices = re.findall(r"# choice: (.*)", "\n".join((ROOT / f).read_text() for f in ("ppo_ldm_sr.py", "sr_inputs.py")))
    assert len(choices) >= 8
    for choice in choices:
        assert choice in listed, choice


def test_the_readme_points_at_the_lines_that_it_names():
    links = re.findall(r"\[`(\w+)`\]\((\w+\.py)#L(\d+)\)", (ROOT / "README.md").read_text())
    assert len(links) > 12
    for name, file, line in links:
        assert re.match(rf"\s*(def |class |){name}\b", (ROOT / file).read_text().splitlines()[int(line) - 1]), (name, file, line)


@pytest.mark.parametrize("script", [orl, eval_sr, pretrain_ldm])
def test_help_shows_every_flag_in_its_group_with_a_sentence_and_its_default(script, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["script", "--help"])
    monkeypatch.setenv("COLUMNS", "250")
    with pytest.raises(SystemExit):
        sr_inputs.parse_args(script.Args, script.__doc__)
    said = capsys.readouterr().out
    for group in script.Args.__bases__:
        assert f"{group.__name__.removesuffix('Args')} options" in said and group.__doc__ in said
        for field in dataclasses.fields(group):
            entries = re.findall(rf"^\W*--{field.name.replace('_', '-')}\b.*(?:\n\W*[^-\W].*)*", said, re.MULTILINE)
            assert len(entries) == 1 and "(default: " in entries[0] and len(entries[0].split()) > 6, field.name
