"""Cohorts whose effect is known: what is there is found, what is not there is not, and bad tables are refused."""

import numpy as np
import pytest
from bundles import CommandLine

for package in ("pandas", "sklearn", "statsmodels"):
    pytest.importorskip(package, reason=f"{package} is not installed: pip install '.[dev]'")

import pandas as pd

from edgemuse.bench.report.downstream import alzheimers, brain_age, together

SUBJECTS, STRUCTURES = 400, 12


def cohort(seed, noise=0.0):
    """Volumes that shrink with age, some of them more in patients; the engine's with `noise` in standard deviations."""
    rng = np.random.default_rng(seed)
    age = rng.uniform(50, 90, SUBJECTS)
    patient = (rng.random(SUBJECTS) < 0.4).astype(int)
    mean = 1000 * np.arange(2, STRUCTURES + 2)
    sd = 0.05 * mean
    shrink = np.outer((age - 70) / 10, np.linspace(0, 0.8, STRUCTURES)) + np.outer(
        patient, np.linspace(1.2, 0, STRUCTURES)
    )
    volumes = mean - sd * (shrink - rng.normal(size=(SUBJECTS, STRUCTURES)))
    subjects = pd.Index([f"sub-{n:03}" for n in range(SUBJECTS)], name="subject")
    names = [f"structure {n}" for n in range(STRUCTURES)]
    reference = pd.DataFrame(volumes, subjects, names)
    engine = reference + noise * sd * rng.normal(size=volumes.shape)
    covariates = pd.DataFrame({"age": age, "sex": np.where(rng.random(SUBJECTS) < 0.5, "F", "M"), "diagnosis": patient})
    return reference, engine, covariates.set_index(subjects)


def test_equal_volumes_give_equal_results():
    tables = together(*cohort(0))
    ages, diagnoses = brain_age(*tables), alzheimers(*tables)
    assert ages.mae[0] == ages.mae[1]
    assert ages.r[0] > 0.7  # the model works at all
    assert (ages.p, ages.p_paired) == (1, 1)
    assert diagnoses.accuracy[0] == diagnoses.accuracy[1] > 0.75
    assert (diagnoses.only, diagnoses.p) == ((0, 0), 1)


def test_a_real_difference_is_found():
    tables = together(*cohort(1, noise=3.0))
    ages, diagnoses = brain_age(*tables), alzheimers(*tables)
    assert ages.mae[1] > 1.2 * ages.mae[0]
    assert max(ages.p, ages.p_paired) < 0.01
    assert diagnoses.accuracy[1] < diagnoses.accuracy[0] - 0.05
    assert diagnoses.f1[1] < diagnoses.f1[0]
    assert diagnoses.p < 0.01


def test_rounding_shows_no_difference_more_often_than_chance_does():
    found = [(brain_age(*t).p < 0.05, alzheimers(*t).p < 0.05) for t in (together(*cohort(s, 0.02)) for s in range(8))]
    assert np.sum(found, axis=0).max() <= 1


def test_the_test_of_decisions_is_mcnemars():
    tables = together(*cohort(2, noise=1.0))
    result = alzheimers(*tables)
    from scipy.stats import binomtest

    assert sum(result.only) > 5
    assert result.p == pytest.approx(binomtest(result.only[0], sum(result.only)).pvalue)


def test_only_healthy_subjects_have_a_brain_age():
    reference, engine, covariates = together(*cohort(0))
    assert brain_age(reference, engine, covariates).subjects == int((covariates["diagnosis"] == 0).sum())
    assert brain_age(reference, engine, covariates.drop(columns="diagnosis")).subjects == SUBJECTS
    assert brain_age(reference, engine, covariates.drop(columns="age")) is None
    assert alzheimers(reference, engine, covariates.assign(diagnosis=1)) is None


@pytest.fixture
def files(tmp_path):
    for name, table in zip(("reference", "engine", "covariates"), cohort(1, 3.0), strict=True):
        table.to_csv(tmp_path / f"{name}.csv")
    return [tmp_path / f"{name}.csv" for name in ("reference", "engine", "covariates")]


@pytest.fixture
def command(capfd, tmp_path):
    return CommandLine(capfd, tmp_path / "engines")


def test_the_command_says_what_it_found(files, command):
    reference, engine, covariates = files
    ran = command("bench", "downstream", reference, engine, "--covariates", covariates)
    assert ran.code == 0, ran.err
    assert ran.out.count("a difference") == 3
    same = command("bench", "downstream", reference, reference, "--covariates", covariates)
    assert same.out.count("no difference shown") == 3


def test_tables_are_matched_by_subject_and_structure(files, command):
    reference, engine, covariates = files
    table = pd.read_csv(reference, index_col=0)
    table.iloc[::-1, ::-1].iloc[:300].to_csv(engine, sep="\t")
    ran = command("bench", "downstream", reference, engine, "--covariates", covariates)
    assert ran.out.count("no difference shown") == 3
    assert "of 300 subjects" in ran.out


def test_a_folder_of_segmentations_is_a_table_too(files, command, tmp_path):
    table = pd.read_csv(files[0], index_col=0)
    folder = tmp_path / "segmented"
    folder.mkdir()
    for subject, volumes in table.iterrows():
        rows = [f"{n}\t{name}\t0\t{volume!r}" for n, (name, volume) in enumerate(volumes.items())]
        (folder / f"{subject}_volumes.tsv").write_text("\n".join(["index\tname\tvoxels\tvolume_mm3", *rows]))
    ran = command("bench", "downstream", files[0], folder, "--covariates", files[2])
    assert ran.out.count("no difference shown") == 3
    assert f"of {SUBJECTS} subjects" in ran.out
    (folder / "x_volumes.tsv").write_text("name\tvolume_mm3\na\t1\na\t2\n")
    assert "not volumes" in command("bench", "downstream", files[0], folder, "--covariates", files[2]).err
    empty = command("bench", "downstream", files[0], tmp_path, "--covariates", files[2])
    assert "no *_volumes.tsv" in empty.err


@pytest.mark.parametrize(
    ("which", "text", "reason"),
    [(0, "a,b\n1,2\n", "no column subject"), (1, "subject,x\n1,2\n1,3\n", "of its own"),
     (0, "subject,x\ns,large\n", "not a number"), (1, "subject,x\ns,\n", "not a number"), (0, "", "not a table"),
     (0, "subject\ns\n", "no volumes"), (2, "subject,height\ns,2\n", "nothing to predict"),
     (2, "subject,age\ns,old\n", "not a number"), (2, "subject,diagnosis\ns,3\n", "must be 1"),
     (2, "subject,age\ns,40\n", "share 0 subjects")],
)  # fmt: skip
def test_bad_tables_are_refused(which, text, reason, files, command):
    files[which].write_text(text)
    ran = command("bench", "downstream", *files[:2], "--covariates", files[2])
    assert (ran.code, ran.err.count("\n")) == (2, 1)
    assert reason in ran.err
