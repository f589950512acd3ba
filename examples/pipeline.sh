# What the pipelines share: a folder of one run's settings, training that goes on where it stopped, a segmenter trained and tested.
# Sourced with OUT (the run's folder), DATA (the data's, or empty) and segmenter (its configuration) set.
data=(${DATA:+"--data.root=$DATA"})
quiet=(--trainer.enable_progress_bar=false --trainer.enable_model_summary=false)
start=$SECONDS

begin() { # settings: of all that is in the folder
  mkdir -p "$OUT"
  if [ -f "$OUT/settings" ] && [ "$(cat "$OUT/settings")" != "$1" ]; then
    echo "$OUT was made with $(cat "$OUT/settings"), this run has $1: set OUT to another folder, or remove it." >&2
    exit 2
  fi
  echo "$1" > "$OUT/settings"
}

say() { # what comes next; a part that runs beside others ends here when its script was killed
  kill -0 $$ 2> /dev/null || exit 1
  printf '\n== %s (%d s)\n' "$1" $((SECONDS - start))
}

checkpoint() { # folder, name: the newest, nothing when there is none
  if [ -d "$1" ]; then find "$1" -name "$2.ckpt" -exec ls -t {} + | head -n 1; fi
}

train() { # folder, arguments: begins, or goes on from the last checkpoint
  local folder=$1; shift
  local last; last=$(checkpoint "$folder" last)
  fairdiff fit "$@" "${data[@]}" "${quiet[@]}" "--trainer.default_root_dir=$folder" ${last:+"--ckpt_path=$last"}
}

generate() { # folder, checkpoint, arguments: samples that exist are not made again
  local folder=$1 from=$2; shift 2
  fairdiff predict "$@" "${data[@]}" "${quiet[@]}" "--trainer.default_root_dir=$folder" "--ckpt_path=$from"
  echo "$(($(wc -l < "$folder/synthetic/manifest.csv") - 1)) samples in $folder/synthetic"
}

score() { # name: tests the segmenter that was trained there
  fairdiff test --config "$segmenter" "${data[@]}" "${quiet[@]}" "--trainer.default_root_dir=$OUT/$1" --ckpt_path=last --verbose=false
}

segment() { # name, arguments
  train "$OUT/$1" --config "$segmenter" "${@:2}"
  score "$1"
}

side_by_side() { # two functions: one after the other, or with JOBS=2 at once on half of the cores each; one that fails stops both
  if [ "$JOBS" = 1 ]; then "$1"; "$2"; return; fi
  local threads=${OMP_NUM_THREADS:-$((($(getconf _NPROCESSORS_ONLN) + 1) / 2))}
  (export OMP_NUM_THREADS=$threads; "$1") & first=$!
  (export OMP_NUM_THREADS=$threads; "$2") & second=$!
  trap 'pkill -P "$first,$second"; kill "$first" "$second" 2> /dev/null' EXIT
  while kill -0 "$first" 2> /dev/null && kill -0 "$second" 2> /dev/null; do sleep 1; done
  if kill -0 "$first" 2> /dev/null; then wait "$second"; wait "$first"; else wait "$first"; wait "$second"; fi
  trap - EXIT
}
