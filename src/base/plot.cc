#include "base/plot.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

namespace dsla {
namespace {

constexpr const char* kColours[] = {"#0b6e99", "#c4472b", "#4a7d2c", "#7b4ea3",
                                    "#a06a00", "#c2578c", "#2b8f83", "#666666"};
constexpr int kLeft = 64, kRight = 16, kTop = 32, kBottom = 44;

struct Axis {
  double low = 0, high = 1;
  bool log = false;

  double Share(double value) const {
    return log ? std::log(value / low) / std::log(high / low) : (value - low) / (high - low);
  }
};

// The smallest of 1, 2, 5 times a power of ten that gives at most `most` steps over `range`.
double NiceStep(double range, int most) {
  const double power = std::pow(10, std::floor(std::log10(range / most)));
  for (const double factor : {1.0, 2.0, 5.0, 10.0})
    if (range / (factor * power) <= most) return factor * power;
  return 10 * power;
}

std::vector<double> Ticks(const Axis& axis) {
  std::vector<double> ticks;
  if (axis.log) {
    for (double power = std::pow(10, std::floor(std::log10(axis.low))); power <= axis.high * 1.001;
         power *= 10)
      for (const double factor : {1.0, 2.0, 5.0})
        if (power * factor >= axis.low * 0.999 && power * factor <= axis.high * 1.001)
          ticks.push_back(power * factor);
    return ticks;
  }
  const double step = NiceStep(axis.high - axis.low, 6);
  for (double t = std::ceil(axis.low / step - 1e-9) * step; t <= axis.high + step * 1e-9; t += step)
    ticks.push_back(std::abs(t) < step * 1e-9 ? 0 : t);
  return ticks;
}

Axis Fit(std::vector<double> values, bool log) {
  Axis axis;
  axis.log = log;
  if (!values.empty()) {
    const auto [low, high] = std::minmax_element(values.begin(), values.end());
    axis.low = *low, axis.high = *high;
  } else if (log) {
    axis.low = 0.1;
  }
  if (axis.high <= axis.low) {  // one value: some room around it
    axis.high = axis.low == 0 ? 1 : axis.low + std::abs(axis.low) * 0.5;
    axis.low -= log || axis.low == 0 ? 0 : std::abs(axis.low) * 0.5;
  }
  return axis;
}

// Where each series' name ends: on the title's line if all fit beside it, else on lines of their
// own below it.
struct Legend {
  struct Place {
    double x = 0;
    int y = 0;
  };
  std::vector<Place> places;
  int height = 0;  // of their own lines
};
Legend PlaceNames(const std::vector<PlotSeries>& series, const std::string& title, int width) {
  constexpr double kLetter = 7, kGap = 14;
  constexpr int kLine = 15;
  double all = 0;
  for (const PlotSeries& one : series) all += kLetter * static_cast<double>(one.name.size()) + kGap;
  Legend legend;
  const bool beside = all + kLetter * static_cast<double>(title.size()) <= width;
  int line = beside ? 0 : 1;
  double right = width;
  for (const PlotSeries& one : series) {
    const double length = kLetter * static_cast<double>(one.name.size());
    if (!beside && right < width && right < length) {
      right = width;
      ++line;
    }
    legend.places.push_back({kLeft + right, kTop - 8 + kLine * line});
    right -= length + kGap;
  }
  legend.height = kLine * line;
  return legend;
}

}  // namespace

std::string EscapeHtml(const std::string& text) {
  std::string out;
  for (const char c : text) {
    if (c == '&')
      out += "&amp;";
    else if (c == '<')
      out += "&lt;";
    else if (c == '>')
      out += "&gt;";
    else if (c == '"')
      out += "&quot;";
    else
      out += c;
  }
  return out;
}

std::string LinePlot(const std::vector<PlotSeries>& series, const PlotOptions& options) {
  const auto shown = [&](const std::pair<double, double>& p) {
    return std::isfinite(p.first) && std::isfinite(p.second) && (!options.log_y || p.second > 0);
  };
  std::vector<double> xs, ys;
  for (const PlotSeries& one : series) {
    for (const auto& point : one.points) {
      if (!shown(point)) continue;
      xs.push_back(point.first);
      ys.push_back(point.second);
    }
  }
  if (!options.log_y && !ys.empty()) ys.push_back(0);  // a length is read against zero
  const Axis x = Fit(xs, false), y = Fit(ys, options.log_y);
  const int w = options.width - kLeft - kRight;
  const Legend legend = PlaceNames(series, options.title, w);
  const int top = kTop + legend.height, h = options.height - top - kBottom;
  const auto px = [&](double value) { return kLeft + w * x.Share(value); };
  const auto py = [&](double value) { return top + h * (1 - y.Share(value)); };

  std::string svg = fmt::format(
      "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {0} {1}\" width=\"{0}\" "
      "height=\"{1}\" font-family=\"sans-serif\" font-size=\"11\">\n"
      "<text x=\"{2}\" y=\"18\" font-size=\"13\">{3}</text>\n",
      options.width, options.height, kLeft, EscapeHtml(options.title));
  for (const double tick : Ticks(x))
    svg += fmt::format(
        "<line x1=\"{0:.1f}\" x2=\"{0:.1f}\" y1=\"{1}\" y2=\"{2}\" stroke=\"#ddd\"/>"
        "<text x=\"{0:.1f}\" y=\"{3}\" text-anchor=\"middle\">{4:g}</text>\n",
        px(tick), top, top + h, top + h + 15, tick);
  for (const double tick : Ticks(y))
    svg += fmt::format(
        "<line x1=\"{1}\" x2=\"{2}\" y1=\"{0:.1f}\" y2=\"{0:.1f}\" stroke=\"#ddd\"/>"
        "<text x=\"{3}\" y=\"{4:.1f}\" text-anchor=\"end\">{5:g}</text>\n",
        py(tick), kLeft, kLeft + w, kLeft - 6, py(tick) + 4, tick);
  svg += fmt::format(
      "<text x=\"{}\" y=\"{}\" text-anchor=\"middle\">{}</text>\n"
      "<text transform=\"translate(14 {}) rotate(-90)\" text-anchor=\"middle\">{}</text>\n",
      kLeft + w / 2, options.height - 10, EscapeHtml(options.x_label), top + h / 2,
      EscapeHtml(options.y_label));
  for (size_t i = 0; i < series.size(); ++i) {
    const char* const colour = kColours[i % std::size(kColours)];
    std::string path, dots;
    for (const auto& point : series[i].points) {
      if (!shown(point)) continue;
      path += fmt::format("{}{:.1f} {:.1f}", path.empty() ? "M" : "L", px(point.first),
                          py(point.second));
      if (series[i].markers)
        dots += fmt::format("<circle cx=\"{:.1f}\" cy=\"{:.1f}\" r=\"3\" fill=\"{}\"/>",
                            px(point.first), py(point.second), colour);
    }
    if (!path.empty())
      svg += fmt::format("<path d=\"{}\" fill=\"none\" stroke=\"{}\" stroke-width=\"1.5\"/>{}\n",
                         path, colour, dots);
    if (series[i].name.empty()) continue;
    svg += fmt::format("<text x=\"{:.0f}\" y=\"{}\" text-anchor=\"end\" fill=\"{}\">{}</text>\n",
                       legend.places[i].x, legend.places[i].y, colour, EscapeHtml(series[i].name));
  }
  return svg + "</svg>\n";
}

}  // namespace dsla
