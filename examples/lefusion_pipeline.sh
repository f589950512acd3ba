#!/usr/bin/env bash
# LeFusion: lesions painted into healthy scans, and what they were worth to a segmenter. On the lung phantom:
#
#   bash examples/lefusion_pipeline.sh
#
# On your own blocks of scans (LeFusion's layout, see docs/data.md), at full size (days on a GPU):
#
#   DATA=/data/lidc KIND=lidc LESIONS=2000 bash examples/lefusion_pipeline.sh
#
# The sets are the paper's: P, real lesions; P', lesions painted anew in the training scans; N', in healthy scans, in the masks
# that lie beside these (not for Emidec, which has none); N'', in healthy scans, in masks that a diffusion of masks made.
# A run that was killed goes on where it stopped when the same command is repeated.
set -euo pipefail
DATA=${DATA:+$(realpath -m "$DATA")}
OUT=${OUT:+$(realpath -m "$OUT")}
cd "$(dirname "$0")/.."

DATA=${DATA:-}          # folder of the data; empty: the phantom
KIND=${KIND:-demo}      # demo, lidc or emidec: which configurations
LESIONS=${LESIONS:-24}  # samples in each of the sets P', N' and N''
OUT=${OUT:-runs/lefusion}

follow=(--data.generate.masks=train) # a lesion of training gives the sphere
sets=(p_prime n_prime n_double_prime)
case $KIND in
  demo) prefix=configs/demo/lidc_ ;;
  lidc) prefix=configs/lidc/ ;;
  emidec) prefix=configs/emidec/ sets=(p_prime n_double_prime)
          follow=(--data.generate.masks=own --data.generate.backgrounds=healthy) ;; # a heart's own wall gives the place
  *) echo "KIND=$KIND; expected is demo, lidc or emidec." >&2; exit 2 ;;
esac
segmenter=${prefix}segment.yaml
if [ "$KIND" = emidec ] && [ -n "$DATA" ] &&
   ! compgen -G "$DATA/Normal/labels/Case_N*" > /dev/null && ! compgen -G "$DATA/Case_N*/Contours/Case_N*" > /dev/null; then
  echo "$DATA has no contours of healthy hearts, in whose walls new infarcts could lie: N'' is left out." >&2
  sets=(p_prime)
fi
. examples/pipeline.sh
begin "DATA=$DATA KIND=$KIND LESIONS=$LESIONS"
export LESIONS_ROOT=$OUT
count=("--data.generate.total=$LESIONS")

say "1/5 a segmenter on the real lesions alone: P"
segment p --config configs/lefusion/sets/p.yaml

say "2/5 a diffusion of lesions, given the scan around them"
train "$OUT/lefusion" --config "${prefix}lefusion.yaml"

if [[ " ${sets[*]} " == *" n_double_prime "* ]]; then
  say "3/5 a diffusion of lesion masks, and $LESIONS masks"
  train "$OUT/lesion_masks" --config "${prefix}lesion_masks.yaml"
  generate "$OUT/lesion_masks" last --config "${prefix}lesion_masks.yaml" "${count[@]}" "${follow[@]}"
fi

say "4/5 lesions: ${sets[*]}"
painter=$(checkpoint "$OUT/lefusion" last)
all=()
for set in "${sets[@]}"; do
  masks=()
  [ "$set" != n_double_prime ] || masks=("--data.generate.masks=$OUT/lesion_masks/synthetic")
  generate "$OUT/$set" "$painter" --config "${prefix}lefusion.yaml" --config "configs/lefusion/$set.yaml" "${count[@]}" "${masks[@]}"
  all+=("$OUT/$set/synthetic")
done

say "5/5 segmenters on P and each of the sets, and on all"
runs=("P=$OUT/p")
for set in "${sets[@]}"; do
  segment "p_and_$set" --config "configs/lefusion/sets/p_and_$set.yaml"
  runs+=("P and $set=$OUT/p_and_$set")
done
segment p_and_all "--data.synthetic=[$(IFS=,; echo "${all[*]}")]"
runs+=("P and all=$OUT/p_and_all")

say "what it was worth"
python examples/show_lesions.py "${all[@]}" --output "$OUT/samples.png" --dataset "${KIND/demo/lidc}" ${DATA:+"--root=$DATA"}
python examples/compare_runs.py "${runs[@]}" --output "$OUT/comparison.md"
echo "Table: $OUT/comparison.md   picture: $OUT/samples.png   reports: $OUT/*/lightning_logs/*/fairness/report.html"
