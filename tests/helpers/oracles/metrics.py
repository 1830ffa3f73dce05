"""Metrics of dense and binary tasks in plain numpy, straight from their definitions, one pixel or class at a time."""

import numpy as np


def segmentation(scores, target, classes, ignore):
    """Mean IoU over the classes present in prediction or target, and pixel accuracy, of labelled pixels."""
    guess, truth = scores.argmax(1)[target != ignore], target[target != ignore]
    ious = []
    for label in range(classes):
        either = np.sum((guess == label) | (truth == label))
        if either:
            ious.append(np.sum((guess == label) & (truth == label)) / either)
    return {"miou": np.mean(ious), "pixel_accuracy": np.mean(guess == truth)}


def depth(output, target):
    """Errors and shares within a ratio, pixel by pixel where the target is positive."""
    pairs = [(p, t) for p, t in zip(output.ravel().tolist(), target.ravel().tolist(), strict=True) if t > 0]
    found = {
        "absolute": np.mean([abs(p - t) for p, t in pairs]),
        "relative": np.mean([abs(p - t) / t for p, t in pairs]),
    }
    for power in (1, 2, 3):
        found[f"delta{power}"] = np.mean([p > 0 and p / t < 1.25**power and t / p < 1.25**power for p, t in pairs])
    return found


def normals(output, target):
    """Angles in degrees of all pixels whose target is not zero."""
    angles = []
    for p, t in zip(np.moveaxis(output, 1, -1).reshape(-1, 3), np.moveaxis(target, 1, -1).reshape(-1, 3), strict=True):
        if t.any():
            lengths = np.linalg.norm(p) * np.linalg.norm(t)
            angles.append(np.degrees(np.arccos(np.clip(p @ t / lengths, -1, 1))) if lengths else 90.0)
    angles = np.array(angles)
    shares = {f"within_{int(limit)}": np.mean(angles < limit) for limit in (11.25, 22.5, 30)}
    return {"mean": angles.mean(), "median": np.median(angles), **shares}


def edges(logits, target):
    """Average precision, and the highest F1 of all thresholds."""
    truth, scores = target.ravel().astype(bool), []
    for threshold in set(logits.ravel().tolist()):
        guess = logits.ravel() >= threshold
        precision, recall = np.mean(truth[guess]), np.mean(guess[truth])
        scores.append(2 * precision * recall / (precision + recall) if precision else 0.0)
    return {"average_precision": binary(logits, target)["average_precision"], "f1": max(scores)}


def keypoints(output, target):
    """Mean absolute error where the target is a number."""
    return {"error": np.nanmean(np.abs(output - target))}


def binary(logits, target):
    """Average precision (sum of precision times step in recall) and the chance that a positive outranks a negative."""
    logits, target = logits.ravel(), target.ravel().astype(bool)
    precision, recall, last = 0.0, 0.0, 0.0
    for threshold in sorted(set(logits.tolist()), reverse=True):
        taken = logits >= threshold
        recall = np.mean(taken[target])
        precision += np.mean(target[taken]) * (recall - last)
        last = recall
    wins = [(p > q) + 0.5 * (p == q) for p in logits[target] for q in logits[~target]]
    return {"average_precision": precision, "auroc": np.mean(wins)}
