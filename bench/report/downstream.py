"""Compare what a cohort study would find with the volumes of two methods: brain age and Alzheimer's disease.

Both methods' volumes go through the same models on the same folds, so that a difference comes from the volumes alone.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.metrics import accuracy_score, f1_score, mean_absolute_error
from sklearn.model_selection import KFold, StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from statsmodels.stats.contingency_tables import mcnemar

from edgemuse.engines.errors import InputError, one_line

FOLDS = 10
SMALLEST = 20
"""The fewest subjects of which a cross-validated model says anything."""
PENALTIES = np.logspace(-3, 5, 17)
SIGNIFICANT = 0.05
AGE, DIAGNOSIS, SEX, SUBJECT = "age", "diagnosis", "sex", "subject"

Table: TypeAlias = Any
"""A pandas.DataFrame whose index is the subjects."""
VOLUMES = "_volumes.tsv"
"""How the names of the files end that `edgemuse segment` writes volumes into."""


@dataclass(frozen=True)
class BrainAge:
    """Age predicted from volumes by cross-validated ridge regression, with either method's volumes.

    Attributes:
        subjects: with an age, healthy ones only where diagnoses are given.
        mae: mean absolute error in years, of the reference and of the engine.
        r: Pearson's, of predicted and true age.
        p: of Mann and Whitney's U test on the absolute errors.
        p_paired: of Wilcoxon's signed-rank test on the same, subject by subject, which sees smaller differences.
    """

    subjects: int
    mae: tuple[float, float]
    r: tuple[float, float]
    p: float
    p_paired: float


@dataclass(frozen=True)
class Alzheimers:
    """Diagnosis from volumes by cross-validated logistic regression, with either method's volumes.

    Attributes:
        subjects: with a diagnosis.
        patients: of them.
        accuracy: share of right decisions, of the reference and of the engine.
        f1: harmonic mean of precision and recall for patients.
        only: subjects whom only the reference's, and whom only the engine's volumes get right.
        p: of McNemar's exact test on those.
    """

    subjects: int
    patients: int
    accuracy: tuple[float, float]
    f1: tuple[float, float]
    only: tuple[int, int]
    p: float


def read_volumes(path: Path) -> Table:
    """Read volumes: a row for each subject and a column for each structure; raises InputError.

    `path` is such a table with a column `subject`, or a folder of `<subject>_volumes.tsv` of `edgemuse segment`.
    """
    table = _gathered(path) if path.is_dir() else _read(path)
    volumes = table.apply(pd.to_numeric, errors="coerce")
    bad = volumes.columns[~np.isfinite(volumes.to_numpy(float)).all(0)]
    if len(bad):
        raise InputError(f"{path}: column {bad[0]} holds something that is not a number; leave that subject out")
    if volumes.empty:
        raise InputError(f"{path}: no volumes in it; expected a column for each structure")
    return volumes


def read_covariates(path: Path) -> Table:
    """Read a table with the columns `subject`, `age` or `diagnosis` (1, 0), and perhaps `sex`; raises InputError."""
    table = _read(path)
    if not {AGE, DIAGNOSIS} & set(table.columns):
        raise InputError(f"{path}: neither {AGE} nor {DIAGNOSIS} in its first line; there is nothing to predict")
    for name in {AGE, DIAGNOSIS} & set(table.columns):
        numbers = pd.to_numeric(table[name], errors="coerce")
        if (numbers.isna() & table[name].notna()).any():
            raise InputError(f"{path}: column {name} holds something that is not a number")
        table[name] = numbers
    if DIAGNOSIS in table and not set(table[DIAGNOSIS].dropna()) <= {0, 1}:
        raise InputError(f"{path}: {DIAGNOSIS} must be 1 for patients, 0 for healthy subjects, or empty")
    return table


def _gathered(folder: Path) -> Table:
    files = sorted(folder.glob(f"*{VOLUMES}"))
    if not files:
        raise InputError(f"{folder}: no *{VOLUMES} in this folder; segment the scans into it")
    return pd.DataFrame({path.name.removesuffix(VOLUMES): _volumes(path) for path in files}).T


def _volumes(path: Path) -> Any:
    table = _parse(path, "name")
    if "volume_mm3" not in table or table.index.has_duplicates:
        raise InputError(f"{path}: not volumes as 'edgemuse segment' writes them")
    return table["volume_mm3"]


def _parse(path: Path, index: str) -> Table:
    """Read the table at `path`, separated by tabs or commas; its column `index` becomes the index."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        separator = "\t" if "\t" in text.partition("\n")[0] else ","
        table = pd.read_csv(io.StringIO(text), sep=separator, dtype={index: str})
    except (OSError, ValueError) as error:  # pandas' own are ValueErrors
        raise InputError(f"{path}: not a table ({one_line(error)})") from error
    if index not in table.columns:
        raise InputError(f"{path}: no column {index} in its first line")
    return table.set_index(index)


def _read(path: Path) -> Table:
    table = _parse(path, SUBJECT).reset_index()
    if table[SUBJECT].isna().any() or table[SUBJECT].duplicated().any():
        raise InputError(f"{path}: every row needs a {SUBJECT} of its own")
    return table.set_index(SUBJECT)


def together(reference: Table, engine: Table, covariates: Table) -> tuple[Table, Table, Table]:
    """Keep the subjects and structures that all tables have, in one order; sex becomes a number beside the volumes."""
    subjects = reference.index.intersection(engine.index).intersection(covariates.index)
    structures = [name for name in reference.columns if name in engine.columns]
    if len(subjects) < SMALLEST or not structures:
        raise InputError(
            f"the three tables share {len(subjects)} subjects and {len(structures)} structures; at least {SMALLEST} "
            "and 1 are needed"
        )
    known = covariates.loc[subjects]
    tables = [table.loc[subjects, structures] for table in (reference, engine)]
    if SEX in known:
        codes = pd.factorize(known[SEX], sort=True)[0].astype(float)
        tables = [table.assign(**{SEX: codes}) for table in tables]
    return tables[0], tables[1], known


def brain_age(reference: Table, engine: Table, covariates: Table, seed: int = 0) -> BrainAge | None:
    """Compare brain age from either method's volumes; None if too few subjects have an age."""
    if AGE not in covariates:
        return None
    wanted = covariates[AGE].notna()
    if DIAGNOSIS in covariates:
        wanted &= covariates[DIAGNOSIS] != 1
    if wanted.sum() < SMALLEST:
        return None
    age = covariates.loc[wanted, AGE].to_numpy(float)
    model = make_pipeline(StandardScaler(), RidgeCV(PENALTIES))
    folds = KFold(FOLDS, shuffle=True, random_state=seed)
    predicted = [cross_val_predict(model, table[wanted], age, cv=folds) for table in (reference, engine)]
    errors = [np.abs(values - age) for values in predicted]
    return BrainAge(
        len(age),
        _pair([mean_absolute_error(age, values) for values in predicted]),
        _pair([stats.pearsonr(age, values).statistic for values in predicted]),
        float(stats.mannwhitneyu(*errors).pvalue),
        float(stats.wilcoxon(*errors).pvalue) if (errors[0] != errors[1]).any() else 1.0,
    )


def alzheimers(reference: Table, engine: Table, covariates: Table, seed: int = 0) -> Alzheimers | None:
    """Compare diagnoses from either method's volumes; None if too few subjects of a kind have one."""
    if DIAGNOSIS not in covariates:
        return None
    wanted = covariates[DIAGNOSIS].notna()
    diagnosis = covariates.loc[wanted, DIAGNOSIS].to_numpy(int)
    if min(diagnosis.sum(), len(diagnosis) - diagnosis.sum()) < FOLDS:
        return None
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000, class_weight="balanced"))
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    decided = [cross_val_predict(model, table[wanted], diagnosis, cv=folds) for table in (reference, engine)]
    right = [values == diagnosis for values in decided]
    return Alzheimers(
        len(diagnosis),
        int(diagnosis.sum()),
        _pair([accuracy_score(diagnosis, values) for values in decided]),
        _pair([f1_score(diagnosis, values) for values in decided]),
        (int((right[0] & ~right[1]).sum()), int((right[1] & ~right[0]).sum())),
        float(mcnemar(_table(right), exact=True).pvalue),
    )


def _table(right: Sequence[NDArray[np.bool_]]) -> NDArray[np.int64]:
    """Count subjects (2, 2): both methods right, only the first; only the second, neither."""
    first, second = right
    return np.array(
        [[(first & second).sum(), (first & ~second).sum()], [(~first & second).sum(), (~first & ~second).sum()]]
    )


def _pair(values: Sequence[float]) -> tuple[float, float]:
    first, second = map(float, values)
    return first, second


def downstream(reference: Path, engine: Path, covariates: Path) -> str:
    """Make both comparisons with the tables in three files, as Markdown; raises InputError."""
    tables = together(read_volumes(reference), read_volumes(engine), read_covariates(covariates))
    parts = [_age_text(brain_age(*tables)), _diagnosis_text(alzheimers(*tables))]
    if parts == [None, None]:
        raise InputError(
            f"{covariates}: brain age needs {SMALLEST} healthy subjects with an {AGE}, a diagnosis {FOLDS} of either "
            "kind"
        )
    return "\n\n".join(part for part in parts if part) + "\n"


def _age_text(result: BrainAge | None) -> str | None:
    if result is None:
        return None
    return (
        f"## Brain age, {result.subjects} subjects, ridge regression, {FOLDS}-fold cross-validation\n\n"
        "| | reference | engine |\n|---|---|---|\n"
        f"| mean absolute error, years | {result.mae[0]:.3f} | {result.mae[1]:.3f} |\n"
        f"| r | {result.r[0]:.4f} | {result.r[1]:.4f} |\n\n"
        f"Absolute errors: Mann-Whitney U, {_verdict(result.p)}; paired, Wilcoxon, {_verdict(result.p_paired)}."
    )


def _diagnosis_text(result: Alzheimers | None) -> str | None:
    if result is None:
        return None
    return (
        f"## Alzheimer's, {result.patients} patients of {result.subjects} subjects, logistic regression, "
        f"{FOLDS}-fold cross-validation\n\n"
        "| | reference | engine |\n|---|---|---|\n"
        f"| accuracy | {result.accuracy[0]:.4f} | {result.accuracy[1]:.4f} |\n"
        f"| F1 | {result.f1[0]:.4f} | {result.f1[1]:.4f} |\n"
        f"| right only here | {result.only[0]} | {result.only[1]} |\n\n"
        f"Decisions: McNemar, exact, {_verdict(result.p)}."
    )


def _verdict(p: float) -> str:
    return f"p = {p:.3g}, {'a difference' if p < SIGNIFICANT else 'no difference shown'}"
