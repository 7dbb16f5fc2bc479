#!/usr/bin/env bash
# The paper's experiment on the embedded data, from image files to the table of results: 5 to 12 minutes on two cores,
# besides the installation of the packages. A second run reuses what is complete.
#
#     bash run_demo.bash
#
# From the environment:
#
# DDIR         the data directory (default: demo_data in this folder)
# NBG          background sizes (default: those of the experiment file, 0 6000 60000); the largest is drawn, or 6000 for the PCA
# NLABELED, SEEDS, JOBS     see run_diffusion.bash; JOBS defaults to half of the cores
# EXPERIMENT   experiment file (default: configs/demo.yaml)
# DATA         more arguments for demo/make_data.py, e.g. "--fonts /usr/share/fonts --minfonts 10": a few fonts have fewer
#              characters in common than a hundred
# EPOCHS       epochs of training (default: 14)
# PYTHON, REQUIREMENTS      see setup.bash
set -euo pipefail
case "${1:-}" in -h|--help) sed -n '2,/^set /{/^set /d; s/^# \{0,1\}//; p}' "${BASH_SOURCE[0]}"; exit ;; esac
[ $# = 0 ] || { echo "run_demo.bash: error: unknown argument '$1', all settings come from the environment (see --help)" >&2; exit 2; }
DDIR=${DDIR:-$(dirname "${BASH_SOURCE[0]}")/demo_data}
mkdir -p "$DDIR"
DDIR=$(cd "$DDIR" && pwd)
export DDIR
EXPERIMENT=$(realpath "${EXPERIMENT:-$(dirname "${BASH_SOURCE[0]}")/configs/demo.yaml}")
EPOCHS=${EPOCHS:-14}
source "$(dirname "${BASH_SOURCE[0]}")/setup.bash"
cd "$(dirname "${BASH_SOURCE[0]}")"

cores=$("$PYTHON" -c 'from lowshot.machine import cpus; print(cpus())')
export JOBS=${JOBS:-$(( (cores + 1) / 2 ))}
# what the steps below have to know of the experiment
settings=$("$PYTHON" - "$EXPERIMENT" << 'END'
import shlex
import sys
from lowshot.experiments import Experiment
from lowshot.layout import DataDir, padded_to_power_of_two
from lowshot.script import run
def main():
    e = Experiment(sys.argv[1])
    nbg = e.diffusion["nbg"]
    k = e.diffusion["k"]
    print(f"NBG='{' '.join(map(str, nbg))}' most={max(nbg)} k={k} columns={padded_to_power_of_two(k)}")
    print(f"folder={shlex.quote(e.folder('diffusion', DataDir()))} table={shlex.quote(DataDir().log(e.name + '.md'))}")
    print(f"dim={e.diffusion['dim']} seed={e.seeds[0]} nlabeled=({' '.join(map(str, e.nlabeled))})")
run(main)
END
)
eval "$settings"
export NBG

step() { now=$SECONDS; number=$((${number:-0} + 1)); printf '\n== %d/9 %s   [%d:%02d]\n' "$number" "$1" $((now / 60)) $((now % 60)); }
# before what is to end when this script ends, however it ends
with_this=()
if command -v setpriv > /dev/null; then with_this=(setpriv --pdeathsig TERM); fi
# run a command, printed so that it can be pasted into a shell in this folder
show() { local words; words=$(printf ' %q' "$@"); echo "\$${words//"$PWD/"/}"; "${with_this[@]}" "$@"; }
SECONDS=0
printf 'data directory:  export DDIR=%q\n' "$DDIR"

step "data: characters of a hundred fonts"
least=$((6000 * dim / 256))         # the PCA needs some in any case
# shellcheck disable=SC2086
show "$PYTHON" demo/make_data.py --nbg $((most > least ? most : least)) ${DATA:-}

step "network: ResNet10, trained on the base classes"
show "$PYTHON" demo/train_network.py --epochs "$EPOCHS"
modelfile=$DDIR/models/checkpoints/ResNet10/$((EPOCHS - 1)).tar

step "features of background and labelled images"
features() {        # configuration, output; the script itself tells whether a file is of this network and these images
    show "$PYTHON" save_features.py --cfg "$1" --model ResNet10 --modelfile "$modelfile" --outfile "$2" --overwrite
}
features demo_train.yaml "$DDIR/features/train.hdf5"
features demo_val.yaml "$DDIR/features/val.hdf5"
features demo_background.yaml "$DDIR/features/f100m/block0.hdf5"

step "PCA to $dim dimensions"
raw=$DDIR/features/f100m/concatenated_PCAR$dim.raw
show "$PYTHON" train_apply_pca.py train apply --dim "$dim" --overwrite

step "graphs of the background"
for nbg in $NBG; do
    graph=$DDIR/knngraph/ndis${nbg}_k${columns}_I_11.int32
    anew=()
    for made in "$graph" "$DDIR/knngraph/ndis$nbg.index"; do
        if [ -e "$made" ] && [ "$raw" -nt "$made" ]; then anew=(--overwrite); fi
    done
    if [ "$nbg" -gt 0 ]; then show "$PYTHON" build_graph.py "$nbg" --k "$k" --dim "$dim" ${anew[@]+"${anew[@]}"}; fi
done

for system in logreg diffusion; do
    for phase in 1 2 3 4; do
        case $phase in
            1) step "$system: validation" ;;
            3) step "$system: test" ;;
        esac
        show bash "run_$system.bash" "$phase" "$EXPERIMENT"
    done
done

echo
"$PYTHON" -m lowshot.phases compare "$EXPERIMENT"
# the contact sheet: what a single label per class finds with the largest background
niter=$("$PYTHON" -c 'import sys; from lowshot.files import read_json
print(read_json(sys.argv[1])[sys.argv[2]][sys.argv[3]]["niter"])' \
        "$folder/parameters.json" "$most" "${nlabeled[0]}")
examples=$DDIR/demo_examples.npz
if [ "$most" -gt 0 ]; then
    show "$PYTHON" diffusion.py --mode test --nlabeled "${nlabeled[0]}" --seed "$seed" --nbg "$most" --k "$k" \
        --dim "$dim" --niter "$niter" --storeexamples "$examples" --record "$DDIR/demo_examples.json"
    show "$PYTHON" demo/show.py --sheet "$DDIR/demo_examples.png" --examples "$examples"
fi
printf '\nall of it: %d:%02d. Table: %s\n' $((SECONDS / 60)) $((SECONDS % 60)) "$table"
echo "figure:   ${table%.md}.png"
if [ "$most" -gt 0 ]; then echo "examples: $DDIR/demo_examples.png"; fi
