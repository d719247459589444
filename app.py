"""A page to try the model in a browser: `pip install gradio`, then `python app.py` or `python app.py --weights mentor`.

Its fields are `sample.py`'s flags, its pictures go to out/. GRADIO_SERVER_NAME=0.0.0.0 opens it to other machines.
"""
import os
import queue
import re
import threading
from concurrent.futures import ThreadPoolExecutor

import cli
import sample
import weights

NUMBERS = "cfg", "temperature", "top-k", "top-p", "seed", "n"


@cli.enough_memory("draw fewer pictures")
def draw(mentor, about, fields, tell, stop):
    """Draws what the page's fields ask for. about: settings that all pictures share; tell: takes ([PIL] so far, None);
    stop: an Event that ends it. -> files of the pictures, the file to download, which for several is the sheet"""
    refs, prompt, subjects, *numbers = fields
    flags = [f"--prompt={prompt}", *(f"--ref={path}" for path, _ in refs or ())]
    flags += [f"--subject={name.strip()}" for name in subjects.split(",") if name.strip()]
    args = sample.parse(flags + [f"--{name}={value}" for name, value in zip(NUMBERS, numbers)])
    requests, seeds = sample.requests_of(args), range(args.seed, args.seed + args.n)
    grow = sample.as_it_grows(mentor, lambda images: tell((images, None)))

    def progress(tokens):
        if stop.is_set():
            raise cli.InputError("stopped")
        grow(tokens)

    images = sample.draw(mentor, args, requests, seeds, progress)
    return cli.save_all(images, cli.picture_names("out", requests[0].prompt, seeds), about | args.sampling | {
        "prompt": requests[0].prompt, "refs": [*map(os.path.basename, args.ref)], "seed": args.seed, "n": args.n})


def page(gr, mentor, about):
    """The page; gr: the module gradio, the others as `draw` takes them. -> gradio.Blocks"""
    def drawn(*fields):
        """Yields what the page shows: the pictures so far, then the finished ones and the file to download."""
        told, stop = queue.SimpleQueue(), threading.Event()
        with ThreadPoolExecutor(1, initializer=cli.pick_device, initargs=[str(mentor.device)]) as pool:
            work = pool.submit(draw, mentor, about, fields, told.put, stop)
            work.add_done_callback(lambda _: told.put(None))
            try:
                yield from iter(told.get, None)
                yield work.result()
            except cli.InputError as error:    # uploads lie in folders with hashes for names
                raise gr.Error(re.sub(r"\S+[\\/]\w{64}[\\/]", "", str(error)), print_exception=False) from None
            finally:
                stop.set()                     # the page's stop button closes this generator

    with gr.Blocks(title="MENTOR", analytics_enabled=False) as blocks:
        gr.Markdown("# MENTOR\n" + sample.ABOUT_TINY if about["weights"] == "tiny" else f"# MENTOR: {about['weights']}")
        with gr.Row():
            refs = gr.Gallery(label="references", file_types=["image"], columns=3, fit_columns=False)
            pictures = gr.Gallery(label="pictures", interactive=False, columns=2, height=620)
        prompt, subjects = gr.Textbox(label="prompt"), gr.Textbox(label="subjects, by commas; default: file names")
        with gr.Row():
            numbers = [gr.Number(value, label=f"--{name}", precision=0 if type(value) is int else None, min_width=90)
                       for name, value in zip(NUMBERS, [*vars(mentor.config.sampling).values(), 0, 1])]
            go, end, save = gr.Button("Draw", variant="primary"), gr.Button("Stop"), gr.DownloadButton("Download")
        gr.Examples([[[sample.EXAMPLE[0]], "a dog face under water", "dog face"], [[], "a volcano", ""],
                     [[sample.EXAMPLE[0]], "The dog face in <image>.", ""]], [refs, prompt, subjects])
        end.click(cancels=go.click(drawn, [refs, prompt, subjects, *numbers], [pictures, save], api_name="draw"))
    return blocks


def main(argv=None):
    """The command line: the model, the page, until Ctrl-C."""
    parser = cli.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", default="tiny", help="as sample.py takes them; default tiny")
    parser.add_argument("--lora", metavar="FOLDER", help="what `train.py --lora` wrote, added to the weights")
    parser.add_argument("--port", type=cli.checked(int, range(1, 65536).__contains__, "a port"), default=7860)
    parser.add_argument("--device", default=cli.pick_device(), help="default: cuda, else mps, else cpu")
    args = parser.parse_args(argv)
    try:
        import gradio as gr
    except ImportError:
        raise cli.InputError("this page needs Gradio; pip install gradio") from None
    about = {"weights": args.weights, "lora": args.lora, "dtype": weights.usual_dtype(args.device)}
    mentor = weights.load(args.weights, args.device, weights.DTYPES[about["dtype"]], lora=args.lora)
    weights.compile_decoder(mentor, 1)
    try:
        page(gr, mentor, about).launch(server_port=args.port)
    except OSError as error:
        raise cli.InputError(f"--port {args.port}: {cli.first_line(error)}; choose another") from None


if __name__ == "__main__":
    cli.run(main)
