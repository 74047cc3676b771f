"""Whole runs of the three scripts, as a user starts them: tiny models, seconds each."""

import contextlib
import csv
import dataclasses
import io
import json
import re
import shutil
import subprocess
import sys

import pytest
import rehearsal
import torch
import tyro
from conftest import ROOT, SHARED, SMALL, interrupt, nothing, refused, run, tiny_ldm, unreachable

import eval_sr
import ppo_ldm_sr as orl
import pretrain_ldm
import upscale_sr


def test_a_run_on_synthetic_scenes_writes_events_checkpoint_and_table(trained):
    folder, said = trained
    assert "synthetic scenes" in said and "LDM with RL" in said
    for name in ("checkpoint.pt", "agent.pt", "table.md", "table.csv", "figure.png", "edit.png", "plane.png", "reward.png"):
        assert (folder / name).stat().st_size > 0, name
    assert "synthetic scenes" in (folder / "table.md").read_text().splitlines()[0]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {"charts/episodic_return", "charts/SPS", "losses/approx_kl", "losses/explained_variance", "reward/psnr",
            "reward/efficiency", "eval/psnr_agent", "eval/psnr_plain", "policy/edit", "losses/edit_clipfrac"} <= tags  # fmt: skip
    from tensorboard.plugins.custom_scalar import layout_pb2, metadata

    layout = layout_pb2.Layout.FromString(events.Tensors(metadata.CONFIG_SUMMARY_TAG)[0].tensor_proto.string_val[0])
    for chart in layout.category[0].chart:  # agent and plain LDM on one card, both from the step before the first
        found = {tag for tag in tags for pattern in chart.multiline.tag if re.search(pattern, tag)}
        assert found == {f"eval/{chart.title}_agent", f"eval/{chart.title}_plain"}
        assert all(events.Scalars(tag)[0].step == 0 for tag in found)
    first, second = [e.step for e in events.Scalars("charts/SPS")]
    assert 16 <= first <= 24 and 16 <= second - first <= 24


def test_the_csv_has_the_promised_columns_methods_and_one_line_per_image_and_method(trained):
    with open(trained[0] / "table.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["scene", "image", "method", "psnr", "ssim", "lpips", "vif", "grid", "weave", "lpips_vgg", "dists", "calls", "seconds", "lr_psnr"]
    methods = {"bicubic", "ldm", "ldm_same_calls", "ldm_consistent", "agent", "autoencoder"}
    assert {r["method"] for r in rows} == methods == set(eval_sr.METHODS) - {"reward_gradient"}
    assert len(rows) == 6 * 2  # one image a scene
    assert all(r["calls"] == "100" for r in rows if r["method"] == "ldm")
    pairs = {(r["scene"], r["image"]): r["calls"] for r in rows if r["method"] == "agent"}
    assert all(pairs[r["scene"], r["image"]] == r["calls"] for r in rows if r["method"] == "ldm_same_calls")


def assert_same(a, b):
    one, two = (orl.load_run(folder / "checkpoint.pt") for folder in (a, b))
    assert all(torch.equal(one["agent"][k], two["agent"][k]) for k in one["agent"])
    one, two = one["optimizer"], two["optimizer"]
    assert one["param_groups"] == two["param_groups"] and len(one["state"]) == len(two["state"]) > 10
    assert all(torch.equal(slot[k], two["state"][i][k]) for i, slot in one["state"].items() for k in slot)


def test_the_method_file_alone_in_an_empty_folder_trains(tmp_path, ldm_folder, image_folder):
    shutil.copy(ROOT / "ppo_ldm_sr.py", tmp_path)
    flags = ["--ldm", ldm_folder, "--dataset", image_folder, "--run-dir", "out", "--total-timesteps", "10", *SMALL]
    command = [sys.executable, "ppo_ldm_sr.py", *map(str, flags)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "out/agent.pt").is_file() and list((tmp_path / "out").glob("events.*"))


def test_stop_and_resume_is_bit_for_bit_the_run_that_never_stopped(trained, tmp_path, ldm_folder, train):
    """Also: the same seed, in another process, gives the same weights."""
    folder = tmp_path / "stopped"
    flags = ("--ldm", ldm_folder, "--dataset", "runs/scenes", "--total-timesteps", 30, *SMALL)
    said = train(interrupt, "--run-dir", folder, *flags, code=130)
    assert f"--resume {folder}" in said
    state = orl.load_run(folder / "checkpoint.pt")
    assert state["iteration"] == 1 and 16 <= state["step"] <= 24
    said = train(nothing, "--resume", folder)
    assert f"step {state['step']} to 30" in said
    assert_same(trained[0], folder)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    assert len(events.Scalars("charts/SPS")) == 2 and events.Scalars("charts/SPS")[0].step == state["step"]  # one curve


def test_what_would_change_a_resumed_run_is_refused(trained, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(trained[0], folder)
    for flag, value in (("gamma", 0.5), ("gamma", 0.99001), ("dataset", "auto"), ("scenes", "river"), ("run-dir", "elsewhere")):
        assert "takes the settings of that run" in refused(capsys, orl, "--resume", folder, f"--{flag}", value)
    file = folder / "checkpoint.pt"
    state = orl.load_run(file)
    orl.save_run(file, state | {"args": state["args"] | {"seed": 43}})
    assert "not another seed" in refused(capsys, orl, "--resume", folder, "--seed", 42)  # 42 is the default, and was given
    orl.save_run(file, state | {"ldm": "0" * 12})
    assert "no longer the LDM that the run began with" in refused(capsys, orl, "--resume", folder)
    del state["args"]["gamma"]
    orl.save_run(file, state)
    assert "written by another version of this code" in refused(capsys, orl, "--resume", folder)
    file.write_bytes(file.read_bytes()[:2000])
    assert "damaged" in refused(capsys, orl, "--resume", folder)
    assert "checkpoint.pt is missing" in refused(capsys, orl, "--resume", tmp_path)


def spoil_the_ldm(mdp, *_):
    next(mdp.ldm.unet.parameters()).data.fill_(float("inf"))


def spoil_the_reward(*_, score=orl.score):
    orl.score = lambda *a: {k: v * float("nan") for k, v in score(*a).items()}


def spoil_the_update(*_, update=orl.update):
    orl.update = lambda agent, *rest: (update(agent, *rest), agent.logstd.data.fill_(float("nan")))[0]


@pytest.mark.parametrize("source, spoil", [
    ("the LDM", spoil_the_ldm), ("the reward", spoil_the_reward), ("the update: lower --learning-rate", spoil_the_update),
])  # fmt: skip
def test_nan_stops_the_run_names_its_source_and_leaves_the_last_good_checkpoint(tmp_path, ldm_folder, source, spoil, train, monkeypatch):
    for name in ("score", "update"):  # put back afterwards
        monkeypatch.setattr(orl, name, getattr(orl, name))
    folder = tmp_path / "nan"
    flags = ("--ldm", ldm_folder, "--dataset", "runs/scenes", "--total-timesteps", 30, *SMALL)
    said = train(spoil, "--run-dir", folder, *flags, code=2)
    assert f"from {source}" in said and str(folder) in said
    state = orl.load_run(folder / "checkpoint.pt")
    assert state["iteration"] == 1 and all(v.isfinite().all() for v in state["agent"].values())


@pytest.mark.parametrize("rate", ["1e3", "1e30"])
def test_a_learning_rate_that_breaks_the_agent_is_named_and_no_broken_checkpoint_is_left(tmp_path, ldm_folder, rate, train):
    flags = ("--ldm", ldm_folder, "--dataset", "runs/scenes", "--total-timesteps", 60, *SMALL)
    flags = ("--run-dir", tmp_path / "wild", "--learning-rate", rate, "--actor-learning-rate", rate, *flags)
    try:
        said = train(nothing, *flags, code=2)
        assert "from the update: lower --learning-rate" in said
    except AssertionError:  # 1e3 may also train on, badly: then everything that is written is finite
        assert rate == "1e3"
    file = tmp_path / "wild/checkpoint.pt"
    assert not file.is_file() or all(v.isfinite().all() for v in orl.load_run(file)["agent"].values())


def test_stopped_before_the_first_checkpoint_the_same_command_begins_again(tmp_path, ldm_folder, train):
    folder = tmp_path / "early"
    flags = ("--run-dir", folder, "--ldm", ldm_folder, "--dataset", "runs/scenes", "--total-timesteps", 30, *SMALL)
    said = train(interrupt, *flags, before=1, code=130)
    assert "nothing was kept" in said and "--resume" not in said and not list(folder.glob("*"))
    train(nothing, *flags)
    assert (folder / "agent.pt").is_file()


def test_a_finished_run_goes_on_with_a_larger_budget_and_the_images_that_it_found(trained, tmp_path, train):
    folder = tmp_path / "longer"
    shutil.copytree(trained[0], folder)
    state = orl.load_run(folder / "checkpoint.pt")
    assert state["args"]["dataset"] == "runs/scenes"
    said = train(nothing, "--resume", folder, "--total-timesteps", state["step"] + 5)
    longer = orl.load_run(folder / "checkpoint.pt")
    assert longer["step"] > state["step"] and f"step {state['step']} to {state['step'] + 5}" in said
    rates = [group["lr"] for group in longer["optimizer"]["param_groups"]]
    left = 1 - state["step"] / (state["step"] + 5)
    assert rates == pytest.approx([1e-3 * left, 1e-3 * left, 3e-4 * left])  # editor, critic; noise and stride


def test_a_new_run_begins_with_the_agent_of_another_and_both_stand_in_one_table(trained, tmp_path, ldm_folder, image_folder, train, capsys):
    folder, began = tmp_path / "sharper", []
    flags = ("--ldm", ldm_folder, "--dataset", image_folder, "--run-dir", folder, "--total-timesteps", 10, *SMALL)
    flags += ("--reward-weights", 0.3, 0.2, 0.4, 0.1, "--agent", trained[0])

    def look(mdp, agent, *_):
        began.append({k: v.clone() for k, v in agent.state_dict().items()})

    said = train(look, *flags, before=1)
    step, first = orl.load_run(trained[0] / "agent.pt")["step"], orl.load_run(trained[0] / "agent.pt")["agent"]
    assert f"begins as {trained[0]}'s, trained for {step} steps on synthetic scenes and this LDM" in said
    assert all(torch.equal(v, first[k]) for k, v in began[0].items() if k != "edit_std")  # which is the new run's
    assert not torch.equal(orl.load_run(folder / "agent.pt")["agent"]["editor.0.weight"], first["editor.0.weight"])
    args = eval_sr.Args(str(trained[0]), front=(str(folder),), scenes=("river",), limit=1, output=str(tmp_path / "out"))
    eval_sr.main(args)
    assert "| LDM with RL, sharper (0.3 0.2 0.4 0.1) |" in capsys.readouterr().out
    tiny_ldm(tmp_path / "other", latent_channels=4)
    other = ("--ldm", tmp_path / "other", "--agent", trained[0], "--dataset", image_folder, *SMALL, "--run-dir", tmp_path / "never")
    assert "made for an LDM of other channels" in refused(capsys, orl, *other) and not (tmp_path / "never").exists()
    assert "is missing or damaged" in refused(capsys, orl, "--agent", tmp_path)


def test_what_auto_found_is_what_a_resumed_run_goes_on_with(tmp_path, ldm_folder, train, monkeypatch):
    monkeypatch.setattr(orl.datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr(orl.huggingface_hub.HfApi, "dataset_info", unreachable)
    monkeypatch.setattr(orl.datasets, "load_dataset", unreachable)
    orl.find_images.cache_clear()
    said = train(interrupt, "--ldm", ldm_folder, "--run-dir", tmp_path / "run", "--total-timesteps", 30, *SMALL, code=130)
    orl.find_images.cache_clear()
    assert "RESISC45 cannot be reached" in said
    assert orl.load_run(tmp_path / "run/checkpoint.pt")["args"]["dataset"] == "runs/scenes"


def test_a_folder_that_cannot_be_written_is_named(tmp_path, ldm_folder, trained, capsys):
    (tmp_path / "file").write_text("not a folder")
    flags = ("--ldm", ldm_folder, "--dataset", "runs/scenes", "--total-timesteps", "30", *SMALL)
    assert "cannot be written" in refused(capsys, orl, "--run-dir", tmp_path / "file/run", *flags)
    said = refused(capsys, eval_sr, "--agent", trained[0], "--limit", 1, "--scenes", "river", "--output", tmp_path / "file/out")
    assert "cannot be written" in said and "--output" in said
    assert "upscale_sr.py's" in refused(capsys, eval_sr, "--images", "photo.png")
    assert "upscale_sr.py's" in refused(capsys, eval_sr, "--images")


def test_bad_settings_end_in_one_sentence_before_anything_is_written(trained, tmp_path, ldm_folder, capsys):
    folder = tmp_path / "never"
    for flags, words in (
        (["--total-timesteps", "-1"], "--total-timesteps"),
        (["--crop", "50", "--dataset", "runs/scenes"], "--crop 50"),
        (["--num-envs", "3"], "--num-envs 3: at least 4"),
        (["--base-steps", "0"], "--base-steps 0: at least 1"),
        (["--base-steps", "1001"], "at most 1000"),
        (["--crop", "32"], "--crop 32: at least 48"),
        (["--crop", "0"], "--crop 0"),
        (["--num-minibatches", "0"], "--num-minibatches 0"),
        (["--update-epochs", "0"], "--update-epochs 0"),
        (["--eval-every", "0"], "--eval-every 0"),
        (["--seed", str(2**64)], "--seed"),
        (["--seed", "-1"], "--seed -1"),
        (["--gamma", "2"], "--gamma 2.0: at least 0, at most 1"),
        (["--learning-rate", "-1"], "--learning-rate -1.0: at least 0"),
        (["--edit-std", "nan"], "--edit-std nan"),
        (["--dataset", "runs/scenes", "--reward-weights", "0", "0", "0", "0"], "is not positive"),
        (["--device", "cuda"], "--device cuda") if not torch.cuda.is_available() else (["--crop", "50"], "--crop 50"),
        (["--dataset", "nowhere/to/be/found"], "no such folder"),
        (["--dataset", "runs/scenes", "--scenes", "volcano"], "no usable image of ['volcano']"),
        (["--ldm", "runs/nothing"], "unreadable"),
        (["--run-dir", trained[0]], "the folder exists"),
    ):
        assert words in refused(capsys, orl, "--ldm", ldm_folder, "--run-dir", folder, *flags)
        assert not folder.exists()
    for flag, value in (("--batch-size", 0), ("--limit", -1), ("--seed", -1), ("--crop", 8)):
        assert flag in refused(capsys, eval_sr, "--agent", trained[0], "--output", folder, flag, value)
    for flag, value in (("--crop", 50), ("--crop", 32), ("--zoom", 0), ("--small-share", 1), ("--batch-unet", 1)):
        assert f"{flag} {value}" in refused(capsys, pretrain_ldm, "--output", folder, flag, value)
    assert not folder.exists()


def test_a_reward_of_lpips_alone_is_refused_where_its_weights_are_missing(tmp_path, ldm_folder, monkeypatch, capsys):
    monkeypatch.setattr(orl, "load_lpips", lambda *rest: None)
    flags = ("--ldm", ldm_folder, "--dataset", "runs/scenes", "--reward-weights", "0", "0", "1", "0")
    assert "without LPIPS's weights" in refused(capsys, orl, "--run-dir", tmp_path / "never", *flags)
    assert not (tmp_path / "never").exists()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_cuda_a_run_trains_end_to_end_and_its_table_says_so(tmp_path):
    said = run("ppo_ldm_sr.py", "--dataset", "runs/scenes", "--run-dir", tmp_path / "cuda", "--total-timesteps", 2000, "--eval-images", 8)
    assert torch.cuda.get_device_name() in said and "LDM with RL" in said
    run("ppo_ldm_sr.py", "--resume", tmp_path / "cuda", "--total-timesteps", 3000, "--device", "cuda")


@pytest.mark.skipif(not (ROOT / "runs/orl_ldm/agent.pt").is_file(), reason="no trained agent in runs/orl_ldm yet")
def test_the_shipped_agent_super_resolves_a_photo(tmp_path, capsys):
    photo = next((ROOT / "runs/scenes/test/river").glob("*.jpg"))
    upscale_sr.main(upscale_sr.Args((str(photo),), output=str(tmp_path)))
    said = capsys.readouterr().out
    assert "256 x 256 -> 1024 x 1024" in said and (tmp_path / f"{photo.stem}_sr.jpg").stat().st_size > 10_000


@pytest.mark.skipif(not (ROOT / "runs/orl_ldm/agent.pt").is_file(), reason="no trained agent in runs/orl_ldm yet")
def test_the_shipped_agent_keeps_its_gain_over_the_plain_ldm():
    """One test image a scene: real ones where they are (the agent was trained on their like), else synthetic scenes."""
    real, device = (SHARED / "data/paper8").is_dir(), torch.device("cpu")
    images = orl.load_images(str(SHARED / "data/paper8") if real else "runs/scenes", "test", (), 128, device)
    ldm = orl.load_ldm("runs/ldm_x4", device)
    agent, net = eval_sr.load_agent(eval_sr.load_run(ROOT / "runs/orl_ldm"), ldm), orl.load_lpips(device)
    first = [images.labels.index(k) for k in range(8)]
    rows, _ = eval_sr.measure(eval_sr.Args(crop=128), orl.Denoising(ldm, 3, 5), images, net, {}, agent, {}, first)
    kinds = ("psnr", "ssim", "lpips", "grid", "calls")
    mean = {m: {k: eval_sr.column(rows, m, k).mean() for k in kinds} for m in ("agent", "ldm", "ldm_consistent")}
    agent, plain, same = mean["agent"], mean["ldm"], mean["ldm_consistent"]
    assert agent["psnr"] > plain["psnr"] + 1 and agent["ssim"] > plain["ssim"] + 0.04 and agent["calls"] <= 5
    if real and agent["lpips"] == agent["lpips"]:  # not NaN
        assert agent["lpips"] < min(plain["lpips"], same["lpips"] - 0.15) and agent["grid"] < 3


def test_pretraining_writes_an_ldm_that_loads_and_goes_on_where_it_stopped(small_unet, tmp_path, capsys):
    folder = tmp_path / "ldm"
    flags = ["--dataset", "runs/scenes", "--output", str(folder), "--crop", "64", "--layers", "1", "--batch-unet", "4", "--batch-decoder", "2", "--report-images", "1"]
    all_parts = ["--minutes-autoencoder", "0.03", "--minutes-unet", "0.03", "--minutes-decoder", "0.03"]
    pretrain_ldm.main(tyro.cli(pretrain_ldm.Args, args=flags + all_parts))
    said = capsys.readouterr().out
    assert "plain DDIM, 100 step(s)" in said and "PCA of 4 x 4 patches, 8 channels" in said and "grid |" in said
    first = json.loads((folder / "training.json").read_text())
    flags += ["--minutes-autoencoder", "0", "--minutes-decoder", "0", "--minutes-unet", "0.03"]
    assert "holds a model; go on with --resume" in refused(capsys, pretrain_ldm, *flags)
    run("pretrain_ldm.py", *flags, "--resume")
    second = json.loads((folder / "training.json").read_text())
    assert all(second[k] == first[k] > 0 for k in ("autoencoder", "decoder")) and second["unet"] > first["unet"] > 0
    assert orl.load_ldm(str(folder), torch.device("cpu")).latent_channels == 8


def test_smooth_crops_are_images_and_smooth():
    crops = pretrain_ldm.smooth(64, 64)
    assert crops.shape == (64, 3, 64, 64) and crops.min() >= 0 and crops.max() <= 1
    assert crops.diff(dim=3).abs().max() < 0.08 and crops.mean(dim=(1, 2, 3)).std() > 0.2


def test_the_readme_explains_every_logged_metric(trained):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(trained[0]))
    events.Reload()
    rows = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("| `")]
    for tag in events.Tags()["scalars"]:
        group, name = tag.split("/")
        plain = re.sub(r"_(agent|plain)$", "", name) if group == "eval" else name
        assert any(r.startswith(f"| `{group}/") and re.search(rf"\b{plain}\b", r) for r in rows), f"README.md explains no {tag}"


def test_every_choice_that_the_code_marks_is_listed():
    text = "".join((ROOT / f).read_text() for f in ("README.md", "runs/orl_ldm/README.md"))
    choices = re.findall(r"# choice: (.*)", (ROOT / "ppo_ldm_sr.py").read_text())
    assert len(choices) >= 8
    for choice in choices:
        assert choice in text, choice


def test_the_readme_points_at_the_lines_that_it_names():
    links = re.findall(r"\[`(\w+)`\]\((\w+\.py)#L(\d+)\)", (ROOT / "README.md").read_text())
    assert len(links) > 12
    for name, file, line in links:
        assert re.match(rf"\s*(def |class |){name}\b", (ROOT / file).read_text().splitlines()[int(line) - 1]), (name, file, line)


@pytest.mark.parametrize("script", [orl, eval_sr, upscale_sr, pretrain_ldm])
def test_help_shows_every_flag_with_a_sentence_and_its_default(script, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["script", "--help"])
    monkeypatch.setenv("COLUMNS", "250")
    with pytest.raises(SystemExit):
        tyro.cli(script.Args, description=script.__doc__)
    said = capsys.readouterr().out
    for field in dataclasses.fields(script.Args):
        if field.default is dataclasses.MISSING:
            assert field.name == "paths" and "LR images, or folders of them" in said
            continue  # no flag: what is named after the script
        entries = re.findall(rf"^\W*--{field.name.replace('_', '-')}\b.*(?:\n\W*[^-\W].*)*", said, re.MULTILINE)
        assert len(entries) == 1 and "(default: " in entries[0] and len(entries[0].split()) > 6, field.name


def test_the_method_is_one_file_that_imports_nothing_of_ours_and_fits_its_width():
    lines = (ROOT / "ppo_ldm_sr.py").read_text().splitlines()
    assert max(map(len, lines)) <= 120
    ours = "|".join(p.stem for p in ROOT.glob("*.py"))
    assert [line.strip() for line in lines if re.match(rf"\s*(import|from) ({ours})\b", line)] == ["import lpips_weights"]


def test_a_whole_iteration_stays_on_its_device_and_seldom_makes_the_host_wait(ldm_folder, image_folder, tmp_path, monkeypatch):
    """On a rehearsed accelerator, since a device mix-up shows on no CPU; on CUDA itself where there is one."""
    if torch.cuda.is_available():
        device, seen = torch.device("cuda"), None
    else:
        device, seen = rehearsal.DEVICE, rehearsal.Rehearsal()
        monkeypatch.setattr(orl, "has_bf16", lambda device: False)
        off = torch.autocast("cpu", enabled=False)
        monkeypatch.setattr(torch, "autocast", lambda *rest, **more: off)
    args = orl.Args(num_envs=4, crop=64)
    with seen or contextlib.nullcontext():
        ldm = orl.load_ldm(str(ldm_folder), device)
        images, mdp = orl.load_images(str(image_folder), "train", (), 64, device), orl.Denoising(ldm, 3, 5)
        spread = ldm.encode(images.crops(8, 64)).std(dim=(0, 2, 3))
        agent = orl.Agent(spread, ldm.hidden_channels).to(device)
        optimizer = torch.optim.Adam([{"params": group} for group in agent.groups()], lr=1e-3, foreach=False)
        assert {p.device.type for p in [*agent.parameters(), *ldm.unet.parameters(), *images.pixels]} == {device.type}
        before = sum((seen.waits if seen else {}).values())
        batch, infos = orl.rollout(mdp, agent, None, images, args, 0)
        rolled = sum((seen.waits if seen else {}).values())
        losses = orl.update(agent, optimizer, batch, args)
        updated = sum((seen.waits if seen else {}).values())
        orl.evaluate(mdp, images.centres(2, 64), None, agent, 0)
        assert {v.device.type for v in [*batch.values(), *infos.values(), *losses.values()]} == {device.type}
    if seen:
        assert not seen.mixed, seen.mixed
        calls = int(infos["calls"].inner.max())
        assert rolled - before <= calls, seen.waits  # each call asks once which images go on
        assert updated == rolled, seen.waits  # the update never waits


def test_a_console_of_few_characters_gets_the_table_and_the_file_is_utf8(trained, tmp_path, monkeypatch):
    flags = ["--agent", str(trained[0]), "--limit", "1", "--scenes", "river", "--output", str(tmp_path)]
    table = "import eval_sr, tyro; eval_sr.pictures = lambda *rest: []; eval_sr.main(tyro.cli(eval_sr.Args))"  # no pictures
    said = run("-c", table, *flags, LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert "dB" in said and "\u2192" in (tmp_path / "table.md").read_text("utf-8")
    console = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(eval_sr, "pictures", lambda *rest: []), monkeypatch.setattr(sys, "stdout", console)
    eval_sr.main(tyro.cli(eval_sr.Args, args=flags))
    console.flush()
    assert b"dB" in console.buffer.getvalue() and "\u2192" in (tmp_path / "table.md").read_text("utf-8")
