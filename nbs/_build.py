"Site and README without Quarto, which can't come from PyPI; where it is installed, nbdev-docs and nbdev-readme work too"
import html, json, re, shutil, sys
from importlib.resources import files
from urllib.parse import unquote

from fastcore.basics import first
from nbdev.config import get_config

cfg = get_config()
math_re = re.compile(r'(?<=<span class="math )(inline|display)">\\[(\[](.*?)\\[)\]](?=</span>)', re.DOTALL)

def mathml(s):
    "HTML `s` with its TeX as MathML: browsers draw that themselves, where a script would have to be fetched"
    from math_core import LatexError, LatexToMathML
    tex = LatexToMathML(fancy_error=False)
    def f(m):
        try: return f'{m[1]}">' + tex.convert_with_local_state(html.unescape(m[2]), displaystyle=m[1]=='display')
        except LatexError as e: raise ValueError(f'character {e} in the formula {m[2]}') from e
    return math_re.sub(f, s)

def ids(page): return set(re.findall(r'\bid="([^"]*)"', page.read_text(encoding='utf-8')))
def hrefs(page): return [unquote(html.unescape(o)) for o in re.findall(r'<a [^>]*?href="([^"]*)"', page.read_text(encoding='utf-8'))]

def broken(site):
    "`page: link` for each link from a page in folder `site` to a place that isn't there"
    for page in sorted(site.rglob('*.html')):
        for href in hrefs(page):
            path,_,anchor = href.partition('#')
            if re.match('[a-z]+:', path): continue
            to = page.parent/path if path else page
            if to.is_dir(): to = to/'index.html'
            if not to.exists() or anchor and to.suffix=='.html' and anchor not in ids(to): yield f'{page.relative_to(site)}: {href}'

def nb_site(path):
    "A smalldocs site of nbdev's processed notebooks in `path`"
    from smalldocs.config import PAGE_KEYS, load
    from smalldocs.site import Site
    PAGE_KEYS.add('output-file')  # else a warning: it's NbSite that reads nbdev's name for the page

    class NbSite(Site):
        def read(self, src):
            page = super().read(src)
            page.out = page.out.with_name(page.front.get('output-file', page.out.name))
            return page

        def find_page(self, target): return super().find_page(target) or first(self.pages.values(), lambda o: o.out==target)

        # nbdev links a symbol to its public address: from the root of the site, the link works wherever the site is
        def resolve(self, href, page, record=True): return super().resolve(href.replace(cfg.doc_url, '/'), page, record)

        def render_page(self, page):
            super().render_page(page)
            try: page.html = mathml(page.html)
            except ValueError as e: sys.exit(f'{page.src}: {e}')
            page.env['math'] = False  # no page asks for KaTeX any more

    site = NbSite(load(path))
    site.out = cfg.doc_path
    site.project.website.pop('site-url', None)  # llms.txt, too, works wherever the site is
    return site

def is_progress(out):
    "Whether a notebook's output is a progress bar, which says nothing on a page"
    return '<progress' in (s := ''.join(out.get('data', {}).get('text/html', '')) + ''.join(out.get('text', ''))) or '█' in s

def tidy_table(s):
    "HTML `s` with the tables of pandas and fastai in it made readable: one header row, and the columns of words to the left"
    if '<table' not in s: return s
    from bs4 import BeautifulSoup
    soup = BeautifulSoup(s, 'html.parser')
    for table in soup('table'):
        head,body = ([o('th')+o('td') for o in part('tr')] if part else [] for part in (table.thead, table.tbody))
        if not head or not body: continue
        n = len(table.tbody.tr('td'))  # the columns of data; those before are the index
        if len(head)>1 and not any(o.text.strip() for o in head[-1][-n:]):  # a row with the names of the index alone
            for a,b in zip(head[-2], head[-1][:-n]):
                if not a.text.strip(): a.string = b.text.strip()
            if all(a.text.strip() in ('', b.text.strip()) or i>=len(head[-1])-n for i,(a,b) in enumerate(zip(head[-2], head[-1]))):
                head.pop()[0].parent.decompose()
        for row in head + body:
            for o in row[:-n]: o['class'] = 'words'
            for o in row: o.string = o.text.strip().lstrip('_')  # fastai's name of a metric may begin with _
        widths = [max(len(row[-j].text) for row in body+head[-1:] if len(row)>=j) for j in range(1, len(head[-1])+1)]
        if sum(widths)+len(widths)>95: table['class'] = [*table.get('class', []), 'wide']
        for j in range(1, n+1):
            cells = [row[-j] for row in body if len(row)>=n]
            if not any(re.search('[A-Za-z]{2}', o.text) for o in cells): continue
            for o in [head[-1][-j], *cells]: o['class'] = 'words' if len(o.text.strip())<=24 else 'words long'
    return str(soup)

def plain(md, n=150):
    "The text of the last paragraph of markdown `md`, without its marks, of at most `n` characters"
    md = re.sub(r'\n*(```|:::).*?(\n\1|$)', '', md.strip(), flags=re.DOTALL).split('\n\n')[-1]
    md = re.sub(r'!?\[([^]]*)\]\([^)]*\)', r'\1', md)
    md = re.sub(r'(?m)^#+ |\{#.*?\}|[`*$|{}()\\]' if '\\' in md else r'(?m)^#+ |\{#.*?\}|[`*$|]', '', md)
    md = re.sub(r'\s+', ' ', md).strip(' :')
    return md if len(md)<=n else md[:n-1].rsplit(' ', 1)[0] + '…'

def tidy(path):
    "Make the outputs of the notebooks in `path` fit for a page, and say for who can't see an image what it's about"
    for p in path.rglob('*.ipynb'):
        nb,alt = json.loads(p.read_text(encoding='utf-8')),''
        for c in nb['cells']:
            s = ''.join(c['source'])
            if c['cell_type']=='markdown': alt = plain(s) or alt
            if c['cell_type']!='code': continue
            c['outputs'] = [o for o in c['outputs'] if not is_progress(o)]
            for o in c['outputs']:
                if 'text/html' in o.get('data', {}): o['data']['text/html'] = tidy_table(''.join(o['data']['text/html']))
            if alt and 'fig-alt' not in s and any('image/' in ' '.join(o.get('data', {})) for o in c['outputs']):
                c['source'] = f'#| fig-alt: {json.dumps(alt, ensure_ascii=False)}\n{s}'
        p.write_text(json.dumps(nb), encoding='utf-8')

def docs():
    "Build the site"
    if sys.version_info<(3,11): sys.exit('The site needs Python 3.11 or newer, for smalldocs: make clean docs python=python3.11')
    from nbdev.quarto import refresh_quarto_yml
    from nbdev.serve import proc_nbs
    refresh_quarto_yml()
    tidy(path := proc_nbs(force=True))
    site = nb_site(path)
    site.build()
    # The site works without the network: no theme's web font, but a font for the maths, which few systems have
    for css in site.out.glob('site_libs/themes/*.css'): css.write_text(re.sub(r'@import url\([^)]*\);', '', css.read_text()))
    shutil.copy(files('ziamath')/'fonts/STIXTwoMath-Regular.ttf', site.out)
    # The address that nbdev writes into each module's docstring
    for md in site.out.rglob('*.llms.md'): md.with_name(md.name.replace('.llms.md', '.html.md')).write_bytes(md.read_bytes())
    if bad := site.warnings[len(site.project.warnings):] + [f'broken link in {o}' for o in broken(site.out)]: sys.exit('\n'.join(bad))

def from_root(cell):
    "Make the links of a notebook's markdown `cell` hold from the root of the repository"
    if cell.cell_type=='markdown': cell.source = re.sub(r'\]\((?!\w+:|[#/])', '](nbs/', cell.source)

def no_echo(cell):
    "Let nbconvert leave out the code that Quarto would"
    if cell.directives_.get('echo')=='false': cell.metadata['transient'] = dict(remove_source=True)

def as_image(cell):
    "Leave out scripts, and take the image of what is one elsewhere"
    if cell.cell_type!='code': return
    cell.outputs = [o for o in cell.outputs if '<script' not in ''.join(o.get('data', {}).get('text/html', ''))]
    for o in cell.outputs:
        if 'image/png' in o.get('data', {}): o['data'].pop('text/html', None)
    cell.metadata['alt'] = cell.directives_.get('fig-alt', '')

def readme():
    "Write README.md and its images"
    from fastcore.nbio import nb2str
    from nbconvert import MarkdownExporter
    from nbdev.process import NBProcessor
    from nbdev.processors import clean_magics, filter_stream_, hide_, hide_line, rm_export, strip_ansi
    import nbformat
    pics = cfg.config_path/'index_files'
    procs = [from_root, no_echo, as_image, hide_line, strip_ansi, filter_stream_, rm_export, clean_magics, hide_]
    nb = NBProcessor(cfg.nbs_path/cfg.readme_nb, procs, rm_directives=True)
    nb.process()
    nb.nb.metadata['language_info'] = dict(name='python')  # the colours of the code; nbdev-clean removes it
    md,res = MarkdownExporter().from_notebook_node(nbformat.reads(nb2str(nb.nb), 4), dict(output_files_dir=pics.name))
    shutil.rmtree(pics, ignore_errors=True)
    for f,data in res['outputs'].items():
        pics.mkdir(exist_ok=True)
        (cfg.config_path/f).write_bytes(data)
    for i,cell in enumerate(nb.nb.cells): md = md.replace(f'![png]({pics.name}/output_{i}_', f'![{cell.metadata.get("alt", "")}]({pics.name}/output_{i}_')
    md = re.sub(r'<style>.*?</style>', '', md, flags=re.DOTALL)  # a code host would show its text
    (cfg.config_path/'README.md').write_text(re.sub(r'\n(\s*\n)+', '\n\n', md).strip()+'\n', encoding='utf-8')

if __name__=='__main__': dict(docs=docs, readme=readme)[sys.argv[1]]()
