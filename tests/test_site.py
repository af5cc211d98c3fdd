"The site as a reader sees it: every page in a browser, from a plain web server, without the rest of the network"
import os, shutil, subprocess, sys
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

if sys.version_info<(3,11): pytest.skip('smalldocs, which makes the site, needs Python 3.11 or newer', allow_module_level=True)
from playwright.sync_api import sync_playwright

class Quiet(SimpleHTTPRequestHandler):
    "A web server that doesn't log"
    def log_message(self, *args): pass

@pytest.fixture(scope='module')
def site(root):
    "The site, built afresh"
    res = subprocess.run([sys.executable, 'nbs/_build.py', 'docs'], cwd=root, capture_output=True, text=True)
    assert res.returncode==0, f'make docs failed:\n{res.stdout}{res.stderr}'
    return root/'_docs'

@pytest.fixture(scope='module')
def url(site):
    "Its address while the tests run"
    with ThreadingHTTPServer(('127.0.0.1', 0), partial(Quiet, directory=site)) as srv:
        Thread(target=srv.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{srv.server_port}/'
        srv.shutdown()

@pytest.fixture(scope='module')
def browser():
    exe = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
    if not exe: (pytest.fail if os.environ.get('CI') else pytest.skip)('No browser to look at the site: apt-get install chromium')
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=exe)
        yield browser
        browser.close()

@pytest.fixture
def page(browser, url):
    "A page of the browser, and in `page.faults` what went wrong on it"
    page = browser.new_page()
    page.faults = []
    def fault(o): page.faults.append(o)
    page.on('console', lambda o: fault(o.text) if o.type in ('error', 'warning') else None)
    page.on('pageerror', lambda o: fault(str(o)))
    page.on('requestfailed', lambda o: fault(f'failed: {o.url}'))
    page.on('request', lambda o: None if o.url.startswith((url, 'data:')) else fault(f'another host: {o.url}'))
    yield page
    page.close()

def check_look(page, name, scheme, width):
    "What can go wrong on a page in this colour scheme and width"
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size(dict(width=width, height=900))
    name = f'{name}, {scheme}, {width} pixels wide,'
    images = page.eval_on_selector_all('img', 'els => els.filter(o => !o.naturalWidth).map(o => o.outerHTML.slice(0, 99))')
    assert not images, f'{name} has images that do not load: {images}'
    assert page.evaluate('document.documentElement.scrollWidth <= innerWidth'), f'{name} is wider than the screen'
    body = page.inner_text('body')
    assert '\\(' not in body and '\\[' not in body, f'{name} has a formula that is not drawn'
    links = page.eval_on_selector_all('main p, main li, main td', 'els => els.map(o => o.textContent).filter(o => o.includes("ipynb)"))')
    assert not links, f'{name} shows the source of a link: {links}'
    assert not page.faults, f'{name} {page.faults}'

def test_pages(site, url, page):
    names = [o.relative_to(site).as_posix() for o in site.rglob('*.html')]
    assert {'index.html', 'mixers.html', 'inside.html'} <= set(names)
    for name in names:
        page.goto(url+name, wait_until='networkidle')
        for look in ('light', 1280), ('dark', 1280), ('light', 390): check_look(page, name, *look)

def test_two_photographs_are_mixed_by_hand(url, page):
    "The image in the middle, and the weights of both labels, follow the slider and the mixer"
    def pixels(name): return page.evaluate(f'''() => {{ const c = document.getElementById('mixing-{name}')
        return [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data] }}''')
    def set_lam(v): page.eval_on_selector('#mixing-lam', f"o => {{ o.value = {v}; o.dispatchEvent(new Event('input', {{bubbles: true}})) }}")
    page.goto(url)
    page.wait_for_selector('#mixing input[value=MixUp]:checked')
    a,b = pixels('a'),pixels('b')
    set_lam(.25)
    assert page.inner_text('#mixing output')=='0.25 cat + 0.75 coffee'
    assert max(abs(m - (.25*p + .75*q)) for m,p,q in zip(pixels('ab'), a, b)) <= 1
    for mixer in 'CutMix','FMix','SaliencyMix':
        page.check(f'#mixing input[value={mixer}]')
        set_lam(.6)
        mixed,weight = pixels('ab'),float(page.inner_text('#mixing output').split()[0])
        own = [mixed[i:i+4]==a[i:i+4] for i in range(0, len(a), 4)]
        assert all(o or mixed[4*i:4*i+4]==b[4*i:4*i+4] for i,o in enumerate(own)), 'a pixel of neither'
        assert abs(sum(own)/len(own) - weight) < .03 and (mixer=='SaliencyMix' or abs(weight-.6) < .03)
    page.focus('#mixing-lam')
    page.keyboard.press('End')
    assert page.inner_text('#mixing output')=='1.00 cat + 0.00 coffee' and pixels('ab')==a
    assert not page.faults

def test_the_chart_leads_to_its_pages(url, page):
    page.goto(url)
    page.click('.chart a:has-text("fewer random labels memorised")')
    page.wait_for_url('**/tutorials/corrupt_labels.html')

def test_search(url, page):
    page.goto(url)
    page.fill('input[type=search]', 'MixUp')
    page.wait_for_selector('.search-result:has-text("MixUp")')
    page.click('.search-result:has-text("MixUp") >> nth=0')
    page.wait_for_load_state()
    assert 'MixUp' in page.inner_text('main')

def test_symbol(url, page):
    "A name in backticks leads to its definition"
    page.goto(url)
    page.click('main a:has(code:text-is("MixUp")) >> nth=0')
    page.wait_for_url('**/mixers.html#mixup')
    assert page.locator(':target').inner_text().startswith('MixUp')
    assert not page.faults

def test_sidebar(site, url, page):
    "Every page is one click away"
    page.goto(url)
    hrefs = page.eval_on_selector_all('#quarto-sidebar a', 'els => els.map(o => o.href.split("#")[0])')
    assert {url+o.relative_to(site).as_posix() for o in site.rglob('*.html')} <= {o+'index.html' if o.endswith('/') else o for o in hrefs}
